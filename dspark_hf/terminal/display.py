"""What an answer looks like: its tokens coloured by source, a line of numbers below while it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dspark_hf.console import printable
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.terminal.replies import SOURCE_NAMES

# told apart without colours too: bold and underlined
STYLES = {"target": "", "model": "bold green", "lookup": "underline cyan"}
# seconds between two pictures of the line of numbers: fewer bytes for slow connections
_REFRESH = 0.1


def sources_of(drafter: Drafter) -> tuple[str, ...]:
    """Return who may give tokens with this drafter."""
    return ("target", *(source for source in ("model", "lookup") if source in drafter.sources))


def legend(sources: Sequence[str]) -> Text:
    """Return a line that says which style is whose."""
    parts: list[str | tuple[str, str]] = [("tokens of the ", "dim")]
    for index, source in enumerate(sources):
        parts += [(", ", "dim")] * (index > 0) + [(SOURCE_NAMES[source], STYLES[source])]
    return Text.assemble(*parts)


class ReplyView:
    """Show an answer while it is written; a context manager.

    In a terminal, lines are printed as soon as they are full; the open one stands above a line of numbers, which
    disappears with the end. Anywhere else the text is written as it comes, and nothing besides.

    Args:
        console: where to.
        note: returns the numbers.
    """

    def __init__(self, console: Console, note: Callable[[], str] = str):
        self._console = console
        self._note = note
        self._open = Text()
        self._has_text = False
        self._shown = 0.0
        is_live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False, transient=True) if is_live else None

    def __enter__(self) -> ReplyView:
        if self._live is not None:
            self._live.start()
            self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(Text(), refresh=True)
            self._live.stop()
            if self._has_text:
                self._console.print(self._open)
        elif self._has_text:
            self._write("\n")

    def show(self, piece: str, source: str) -> None:
        """Append a piece of text; the model's own words command no terminal."""
        text = printable(piece)
        self._has_text = True
        if self._live is None and self._console.is_terminal:
            self._console.print(Text(text, style=STYLES[source]), end="", soft_wrap=True)
        elif self._live is None:
            # as it is: tabs stay tabs, long lines stay whole
            self._write(text)
        else:
            self._open.append(text, style=STYLES[source] or None)
            *full, self._open = self._open.wrap(self._console, self._console.width)
            for line in full:
                self._console.print(line)
            if full or perf_counter() - self._shown > _REFRESH:
                self._refresh()

    def _refresh(self) -> None:
        assert self._live is not None
        self._shown = perf_counter()
        numbers = Text(self._note(), style="dim", no_wrap=True, overflow="ellipsis")
        self._live.update(Group(self._open, numbers) if self._open.plain else numbers, refresh=True)

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()
