"""What the demo writes to the terminal below the answers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from dspark_hf.console import print_table
from dspark_hf.demo.comparison import Comparison, Summary, summarize
from dspark_hf.terminal.display import STYLES

_BAR_WIDTH = 30


def print_results(
    console: Console, comparisons: Sequence[Comparison], partings: Sequence[str], *, is_exact: bool
) -> None:
    """Print the gain of each kind and of all, the drafter's acceptance by position, where texts part, and a verdict.

    `partings` has a sentence for each comparison whose texts part, and an empty one for the others.
    """
    total = summarize(comparisons)
    headings = ("prompts", "same\ntext", "tau", "passes\nplain", "\nDSpark", "tokens/s\nplain", "\nDSpark", "\ngain")
    kinds = dict.fromkeys(comparison.kind for comparison in comparisons)
    rows = [(kind, *_cells(summarize([one for one in comparisons if one.kind == kind]))) for kind in kinds]
    title = "The same answers, with and without drafts"
    print_table(console, title, headings, [*rows, ("all", *_cells(total))], num_labels=1)
    console.print("tau: tokens per round, the target's own token included. Times: medians.")
    _print_accept_rates(console, total)
    for comparison, parting in zip(comparisons, partings, strict=True):
        if parting:
            console.print(Text(f"\n{comparison.kind}: {parting}"))
    console.print(_verdict(total, is_exact=is_exact))


def _cells(summary: Summary) -> list[str]:
    return [
        "yes" if summary.is_identical else "NO",
        f"{summary.tau:.2f}",
        str(summary.plain_passes),
        str(summary.assisted_passes),
        f"{summary.plain_speed:.1f}",
        f"{summary.assisted_speed:.1f}",
        f"{summary.ratio:.2f}x",
    ]


def _print_accept_rates(console: Console, total: Summary) -> None:
    console.print("\nThe drafter's drafts by position: share accepted, given that those before were:")
    for position, rate in enumerate(total.accept_rates, start=1):
        bar = "█" * round(rate * _BAR_WIDTH)
        console.print(f"  draft {position}  {rate:4.0%}  ", Text(bar, style=STYLES["model"]), sep="")
    if total.num_looked_up:
        console.print(
            f"Besides, {total.num_looked_up} drafts were looked up in the text: {total.lookup_rate:.0%} held."
        )


def _verdict(total: Summary, *, is_exact: bool) -> str:
    saved = 1 - total.assisted_passes / total.plain_passes
    if total.is_identical:
        return f"\nIdentical text, {saved:.0%} fewer passes of the target."
    if is_exact:
        return "\nThe texts differ, which must not happen in fp32. Please report this."
    return (
        f"\n{saved:.0%} fewer passes of the target. Texts can differ here: in bf16 a pass over several tokens rounds "
        "otherwise than a pass over one, which decides near ties. With `--dtype fp32` they are identical."
    )
