"""What all commands show in the same way: progress, text of others, and silence from Transformers meanwhile."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress


def print_table(
    console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, num_labels: int = 0
) -> None:
    """Print a title and a table of text; the first `num_labels` columns say what a row is of.

    They are written below one another in one column where they would not fit beside each other: names are long,
    terminals are not.
    """
    table = _build_table(headings, rows, num_labels)
    if num_labels > 1 and Measurement.get(console, console.options, table).maximum > console.width:
        stacked = [("\n".join(row[:num_labels]), *row[num_labels:]) for row in rows]
        table = _build_table(("\n".join(headings[:num_labels]), *headings[num_labels:]), stacked, 1, show_lines=True)
    console.print(Text(title, style="bold"))
    console.print(table)


def _build_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], num_labels: int, *, show_lines: bool = False
) -> Table:
    table = Table(show_lines=show_lines, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        if index < num_labels:
            table.add_column(Text(heading), overflow="fold")
        else:
            table.add_column(Text(heading), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


# what a terminal obeys instead of showing it: C0 but for line feed and tab, DEL, C1; and halves of characters, which
# cannot be written at all
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text that a terminal shows as it is: what would command it becomes the replacement character.

    Whatever a model, a server or a file's name says goes through here before it is printed.

    Example:

        >>> printable("\\x1b]0;title\\x07 and\\ttab")
        '\ufffd]0;title\ufffd and\\ttab'
    """
    return _COMMANDS.sub("\N{REPLACEMENT CHARACTER}", text)


def say(console: Console, text: str) -> None:
    """Print a line that holds paths or names: nothing in it is markup, and it is not broken."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def progress_bar(console: Console, *, note: str = "") -> Progress:
    """Return a bar with counts and times, which disappears when it is done; `note`: a format of what stands behind."""
    # imported here: commands print their help without it
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    # what stands behind the bar says more than its length
    columns = (TextColumn("{task.description}"), BarColumn(12 if note else 40), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn(), *([TextColumn(note, markup=False)] if note else []))
    return Progress(*columns, *times, console=console, transient=True)


class Steps:
    """How far a long call is, on standard error: a bar in a terminal, a line at every tenth anywhere else.

    Args:
        description: what is done.
        total: number of steps; None where nobody knows.
        completed: steps that were done before.
        is_shown: whether anything is shown at all, but for what is said.
    """

    def __init__(self, description: str, total: int | None = None, *, completed: int = 0, is_shown: bool = True):
        # in a notebook a bar would need widgets
        self._console = Console(stderr=True, force_jupyter=False)
        self._description, self._total, self._completed, self._note = description, total, completed, ""
        self._is_shown = is_shown
        self._tenth = self._tenths()
        self._bar = None
        if is_shown and self._console.is_terminal:
            self._bar = progress_bar(self._console, note="{task.fields[note]}")
            self._task = self._bar.add_task(escape(description), total=total, completed=completed, note="")

    def __enter__(self) -> Steps:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """Count steps that are done."""
        self.reach(self._completed + count)

    def reach(self, completed: int) -> None:
        """Say how many steps are done."""
        self._completed = completed
        if self._bar is not None:
            self._bar.update(self._task, completed=completed)
        elif self._is_shown and self._tenths() > self._tenth:
            self._tenth = self._tenths()
            note = f"; {self._note}" if self._note else ""
            self.say(f"{self._description}: {completed:,} of {self._total:,}{note}")

    def describe(self, description: str, note: str | None = None) -> None:
        """Say what is done, and behind the times what it comes to."""
        self._description, self._note = description, self._note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, description=escape(description), note=self._note)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        say(self._console, text)

    def close(self) -> None:
        """Take the bar away; the terminal is as it was before."""
        if self._bar is not None:
            self._bar.stop()

    def _tenths(self) -> int:
        return 10 * self._completed // self._total if self._total else 0


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let Transformers show errors only, and no bars of its own."""
    # imported here: commands print their help without it
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
