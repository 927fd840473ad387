"""A terminal shows the words of others, and obeys none of them."""

from __future__ import annotations

import io

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from dspark_hf.cli.command import PackageCommand
from dspark_hf.console import Steps, printable, say
from dspark_hf.terminal.display import ReplyView

COMMANDS = [
    pytest.param("\x1b]0;title\x07", id="title"),
    pytest.param("\x1b[2J", id="clear"),
    pytest.param("\x9b2J", id="clear in one byte"),
    pytest.param("\x1b]52;c;aGk=\x1b\\", id="clipboard"),
    pytest.param("\x1b]8;;http://a\x1b\\link", id="link"),
    pytest.param("\r\x7f\x08", id="write over"),
]


def _obeyed(text: str) -> bool:
    # as terminals read: anything below a space but line feed and tab, DEL, and C1
    return any(one not in "\n\t" and (ord(one) < 32 or 127 <= ord(one) < 160) for one in text)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_models_text_commands_nothing(command: str) -> None:
    """A model's answer renames the window, clears the screen or fills the clipboard."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=False, width=80)
    with ReplyView(console) as view:
        view.show(f"a{command}b\n\tc", "model")
    say(console, f"[bold]{command}[/x]")
    assert not _obeyed(shown.getvalue())
    assert "b\n\tc" in shown.getvalue() or "b\n        c" in shown.getvalue()
    # what looks like markup is part of the text
    assert "[bold]" in shown.getvalue() and "[/x]" in shown.getvalue()
    assert _obeyed(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_message_commands_nothing(command: str) -> None:
    """The message of an error quotes a file, and the terminal obeys it."""
    app = typer.Typer()

    def fail() -> None:
        raise typer.BadParameter(f"got {command}")

    app.command(cls=PackageCommand)(fail)
    result = CliRunner().invoke(app, [], env={"NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 2 and not _obeyed(result.output)


def test_all_other_text_stays() -> None:
    """Words in other scripts, or pictures, are not shown."""
    text = "naïve 漢字 👩‍👩‍👧 \t\n e\u0301 [x]"
    assert printable(text) == text
    assert printable("\ud800") == "\ufffd"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error passes for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def test_a_log_tells_how_far_a_long_call_is(capfd: pytest.CaptureFixture[str]) -> None:
    """A run whose output goes to a file says nothing for hours, or fills the file."""
    with Steps("prompts", 40, completed=4) as steps:
        steps.describe("answers [1]", "5 tokens/s")
        for _ in range(36):
            steps.advance()
        steps.say("done")
    expected = [f"answers [1]: {count} of 40; 5 tokens/s" for count in range(8, 41, 4)]
    assert capfd.readouterr().err.splitlines() == [*expected, "done"]
    with Steps("prompts", 2, is_shown=False) as steps:
        steps.advance(2)
    # nobody knows how many
    with Steps("prompts") as steps:
        steps.advance(2)
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("terminal")
def test_a_bar_leaves_the_terminal_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    """The bar of a call that fails keeps the cursor, or stays on the screen."""
    with pytest.raises(RuntimeError), Steps("prompts", 40) as steps:
        steps.describe("answers [1]", "5 tokens/s")
        steps.advance(3)
        raise RuntimeError
    shown = capfd.readouterr().err
    assert "answers [1]" in shown and "3/40" in shown and "5 tokens/s" in shown
    hide, show, clear_line = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"
    assert shown.rindex(show) > shown.rindex(hide)
    assert shown.endswith(clear_line)
