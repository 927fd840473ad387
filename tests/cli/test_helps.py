"""The help of every command: whole in a terminal of 80 columns, with examples that can be typed."""

from __future__ import annotations

import re
import shlex
from functools import cache
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dspark_hf.cli.examples import EXAMPLES
from dspark_hf.cli.main import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands


@cache
def _help(command: str) -> str:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0
    return result.output


def _options(command: str) -> set[str]:
    parameters = COMMANDS[command].params
    return {name for one in parameters for name in (*one.opts, *one.secondary_opts) if name.startswith("-")}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_cut(command):
    """A name in a help of 80 columns is cut, so that nobody can type it, or an option is in no panel."""
    shown = _help(command)
    assert all(len(line) <= 80 for line in shown.splitlines())
    words = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown))
    assert _options(command) <= words


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_can_be_typed(command):
    """A help has no example, or one whose options, command or number of arguments do not exist."""
    shown = " ".join(_help(command).split())
    assert "Examples:" in shown and EXAMPLES[command]
    for example in EXAMPLES[command]:
        assert example in shown
        program, name, *words = shlex.split(example.partition(" < ")[0])
        assert (program, name) == ("dspark-hf", command)
        # click itself reads it: unknown options, wrong values and missing ones are errors
        COMMANDS[command].make_context(name, words)


def test_an_example_that_cannot_be_typed_is_noticed():
    """The test of examples cannot fail."""
    for words in (["--target", "a", "--nonsense"], ["--target", "a"], ["--preset", "huge"]):
        with pytest.raises(Exception, match="(?i)no such option|missing|not one of"):
            COMMANDS["train"].make_context("train", words)


def test_long_helps_have_panels():
    """Twenty options stand in one list."""
    for name, command in COMMANDS.items():
        titles = re.findall(r"─ ([A-Z][\w ,]+) ─", _help(name))
        if len(command.params) > 12:
            assert len(titles) >= 3, name


def test_answering_commands_share_their_options():
    """The same thing has two names, two helps or two defaults."""
    of = {command: {one.name: one for one in COMMANDS[command].params} for command in COMMANDS}
    # the same question: other commands ask for a list of schedulers, or have no default for a length
    same = [("generate", "chat", name) for name in set(of["generate"]) & set(of["chat"])]
    assert {"system", "thinking", "temperature", "top_p", "seed"} <= {name for *_, name in same}
    same += [("generate", "serve", name) for name in ("drafter", "dtype", "device", "scheduler", "num_drafts")]
    same.append(("generate", "eval", "num_drafts"))
    for first, second, name in same:
        one, other = of[first][name], of[second][name]
        assert (one.opts, one.default, getattr(one, "help", None)) == (
            other.opts,
            other.default,
            getattr(other, "help", None),
        )
