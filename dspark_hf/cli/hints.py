"""What every command ends with: the command that usually follows it."""

from __future__ import annotations

import shlex

from rich.console import Console

from dspark_hf.cli.options import as_given
from dspark_hf.console import say


def say_next(console: Console, *words: str) -> None:
    """Print the next command; `words` are its name and arguments, which are quoted where a shell needs that.

    A packaged model is called as the user called it, not by the folder that it lies in.
    """
    say(console, f"Next: dspark-hf {shlex.join(map(as_given, words))}")
