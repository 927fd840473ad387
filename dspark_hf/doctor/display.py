"""A diagnosis in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dspark_hf.console import printable

if TYPE_CHECKING:
    # they show themselves with what is here
    from dspark_hf.doctor.results import Costs, Diagnosis, Trial

_MARKS = {True: ("ok", "green"), False: ("no", "red"), None: ("?", "dim")}
# what did no harm in a pair that fits
_HARMLESS = ("!", "yellow")


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print the checks, the trials, the costs, what to set, and the verdict last."""
    console.print(diagnosis)


def parts(diagnosis: Diagnosis, console: Console) -> Iterator[Any]:
    """Give what is shown of a diagnosis, from top to bottom."""
    yield Text(printable(f"{diagnosis.target}, drafter {diagnosis.drafter}"), style="bold")
    if diagnosis.checks:
        yield _checks(diagnosis)
    if diagnosis.trials:
        yield Text("Share of drafts accepted, by position, read ...", style="bold")
        yield _trials(diagnosis.trials)
    if diagnosis.thinking:
        yield Text("As configured, on text with ...", style="bold")
        yield _trials(diagnosis.thinking)
    if diagnosis.expected_rate is not None:
        yield Text(f"The confidence head expects {diagnosis.expected_rate:.0%} of first drafts to be accepted.")
    if diagnosis.costs is not None:
        yield Text(f"Costs here, one row, {diagnosis.costs.context_length} tokens of context", style="bold")
        yield _costs(diagnosis.costs)
    for line in diagnosis.advice:
        yield Text(line)
    style = "bold green" if diagnosis.verdict.exit_status == 0 else "bold red"
    yield Text(printable(diagnosis.verdict.sentence), style=style)
    yield Text(f"{diagnosis.verdict.cause}, in {diagnosis.seconds:.0f} s", style="dim")


def _table(headings: Sequence[str], num_labels: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        is_label = index < num_labels
        table.add_column(heading, justify="left" if is_label else "right", overflow="fold", no_wrap=not is_label)
    return table


def _checks(diagnosis: Diagnosis) -> Table:
    table = _table(("", "", "found"), 3)
    for check in diagnosis.checks:
        is_harmless = check.is_right is False and diagnosis.verdict.cause == "fits"
        mark, style = _HARMLESS if is_harmless else _MARKS[check.is_right]
        table.add_row(Text(mark, style=style), check.name, Text(printable(check.found)))
    return table


def _trials(trials: Sequence[Trial]) -> Table:
    longest = max(len(trial.num_reached) for trial in trials)
    table = _table(("", "tau", *map(str, range(1, longest + 1))), 1)
    for trial in trials:
        rates = [f"{rate:.0%}" if n else "" for rate, n in zip(trial.accept_rates, trial.num_reached, strict=True)]
        rates += [""] * (longest - len(rates))
        table.add_row(Text(printable(trial.label)), f"{trial.tau:.2f}", *rates)
    return table


def _costs(costs: Costs) -> Table:
    table = _table(("drafts", "draft ms", "pass ms", "pays from tau", "speed promised"), 0)
    plain = costs.pass_ms.get(1)
    if plain is not None:
        table.add_row("0", "", f"{plain:.2f}", "", "1.00x")
    for count, draft in costs.draft_ms.items():
        needed, speed = costs.break_even.get(count), costs.speed.get(count)
        table.add_row(
            str(count),
            f"{draft:.2f}",
            f"{costs.pass_ms[1 + count]:.2f}" if 1 + count in costs.pass_ms else "",
            "" if needed is None else f"{needed:.2f}",
            "" if speed is None else f"{speed:.2f}x",
        )
    return table
