"""What stands in a terminal of any width, with and without colours, and in a pipe."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from dspark_hf.terminal.display import ReplyView, legend

PIECES = [
    ("It", "target"),
    (" was a [bold]long[/x] line that goes on and on,", "model"),
    ("\n\n\tindented", "lookup"),
    ("漢字" * 30, "target"),
    (" end\n", "model"),
    ("last", "lookup"),
]
TEXT = "".join(piece for piece, _ in PIECES)
# what rich writes to move the cursor and to colour; nothing of it comes from a model
SEQUENCES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


def _shown(width: int, *, note: str = "numbers", **options: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, height=12, **options)
    with ReplyView(console, lambda: note) as view:
        for piece, source in PIECES:
            view.show(piece, source)
    return file.getvalue()


def test_a_pipe_gets_the_text():
    """A program that reads the answer gets broken lines, colours or numbers."""
    assert _shown(40, force_terminal=False) == TEXT + "\n"


@pytest.mark.parametrize("width", [40, 80])
def test_a_terminal_gets_every_word_once(width):
    """A line that is full is lost, shown twice, or wider than the terminal."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=12, force_terminal=True, color_system="truecolor", no_color=True)
    # where the picture is not refreshed in between, all that is printed stays
    with ReplyView(console) as view:
        view._refresh = lambda: None
        for piece, source in PIECES:
            view.show(piece, source)
    # the open line is drawn below each full one, and again at the end
    text = SEQUENCES.sub("", file.getvalue())
    kept = re.sub(r"\s+", "", text)
    assert re.sub(r"\s+", "", TEXT) in kept
    assert all(cell_len(line) <= width for line in text.splitlines())


def test_colours_are_left_out():
    """NO_COLOR is not obeyed, or sources cannot be told apart without colours."""
    colourful, plain = (
        _shown(80, force_terminal=True, no_color=no_color, color_system="standard") for no_color in (False, True)
    )
    assert "\x1b[1;32m" in colourful and "\x1b[4;36m" in colourful
    assert "\x1b[1m" in plain and "\x1b[4m" in plain
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain)


def test_a_simple_terminal_gets_text_alone(monkeypatch):
    """A terminal without cursor movements is sent some."""
    monkeypatch.setenv("TERM", "dumb")
    shown = _shown(80, force_terminal=True)
    assert "numbers" not in shown and "\x1b[2K" not in shown
    assert "last" in shown


def test_the_legend_names_who_takes_part():
    """The legend shows a drafter where there is none."""
    assert str(legend(("target", "lookup"))) == "tokens of the target, lookup"
    assert str(legend(("target", "model", "lookup"))) == "tokens of the target, drafter, lookup"
