"""Where a chat's lines come from."""

from __future__ import annotations

import io
import stat
import sys

import pytest

from dspark_hf.terminal import asking
from dspark_hf.terminal.asking import open_asking


def test_a_pipe_ends():
    """A pipe that is at its end is read for ever, or its last line is lost without a line feed."""
    lines = io.StringIO("one\ntwo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", lines)
        ask = open_asking([], None, pytest.fail)
        assert [ask().strip(), ask().strip()] == ["one", "two"]
        with pytest.raises(EOFError):
            ask()


def test_a_terminal_without_the_extra_asks_all_the_same(monkeypatch):
    """Without prompt_toolkit the chat does not start, or nobody is told what is missing, or at every question."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    monkeypatch.setattr(asking, "is_interactive", lambda: True)
    monkeypatch.setattr(asking, "find_spec", lambda name: None)
    said: list[str] = []
    ask = open_asking([], None, said.append)
    assert [ask(), ask()] == ["one", "two"]
    assert len(said) == 1 and "dspark-hf[chat]" in said[0]


def test_lines_of_several_rows_and_history(monkeypatch, tmp_path):
    """A new line cannot be typed, questions are forgotten, or others on the machine may read them."""
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setattr(asking, "is_interactive", lambda: True)
    path = tmp_path / "new" / "history"
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        ask = open_asking(["/help"], path, pytest.fail)
        keys.send_text("one\x1b\rtwo\r")
        assert ask() == "one\ntwo"
        # arrow up, and completion
        keys.send_text("\x1b[A\x1b[A\r")
        assert ask() == "one\ntwo"
        keys.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            ask()
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            ask()
        again = open_asking([], path, pytest.fail)
        keys.send_text("\x1b[A\r")
        assert again() == "one\ntwo"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
