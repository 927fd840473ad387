"""What the demo writes to the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from dspark_hf.console import print_table, printable
from dspark_hf.demo.comparison import Comparison, Summary, summarize

DRAFT_STYLE = "bold green"
_BAR_WIDTH = 30


def piece_printer(console: Console) -> Callable[[str, bool], None]:
    """Return a function that appends a piece of text to the line, in green if it was a draft.

    The text is the model's own: a terminal shows it, and obeys nothing in it.
    """

    def show(piece: str, is_draft: bool) -> None:
        console.print(Text(printable(piece), style=DRAFT_STYLE if is_draft else ""), end="", soft_wrap=True)

    return show


def print_results(console: Console, comparisons: Sequence[Comparison], *, is_exact: bool) -> None:
    """Print the table, the acceptance by position, and what they say."""
    total = summarize(comparisons)
    headings = ("prompt", "identical", "tau", "passes\nplain", "\nDSpark", "tokens/s\nplain", "\nDSpark", "\nratio")
    rows = [(str(number), *_cells(summarize([one]))) for number, one in enumerate(comparisons, start=1)]
    title = "The same answers, with and without a drafter"
    print_table(console, title, headings, [*rows, ("all", *_cells(total))])
    console.print("tau: tokens per round, the target's own token included. Times: medians.")
    _print_accept_rates(console, total)
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
    console.print("\nAcceptance by position, given that the drafts before were accepted:")
    for position, rate in enumerate(total.accept_rates, start=1):
        bar = "█" * round(rate * _BAR_WIDTH)
        console.print(f"  draft {position}  {rate:4.0%}  ", Text(bar, style=DRAFT_STYLE), sep="")


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
