"""Where a chat's lines come from: a terminal with history and completion, a plain terminal, or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from dspark_hf.console import printable

_PROMPT = "> "
# called for the next line; raises `EOFError` when there are no more, `KeyboardInterrupt` for Ctrl-C
Ask = Callable[[], str]


def open_asking(commands: Sequence[str], history: Path | None, say: Callable[[str], None]) -> Ask:
    """Return what asks for the next line.

    Args:
        commands: what begins with a slash, for completion.
        history: file that remembers lines beyond this chat; None: this chat alone.
        say: told once if the terminal offers less than it could.
    """
    if not is_interactive():
        return _read_pipe
    if find_spec("prompt_toolkit") is None:
        say('Without history and completion: pip install "dspark-hf[chat]" brings them.')
        with suppress(ImportError):
            # where it is there, arrows bring back what was typed
            import readline  # noqa: F401
        return lambda: input(_PROMPT)
    return _open_session(commands, history)


def is_interactive() -> bool:
    """Return whether somebody types and reads; a prompt sign has no place in a pipe."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _read_pipe() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _open_session(commands: Sequence[str], history: Path | None) -> Ask:
    # imported here: an extra, and nothing that a pipe needs
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    remembered: History = InMemoryHistory() if history is None else FileHistory(_private(history))
    completer = WordCompleter(list(commands), sentence=True)
    session: PromptSession[str] = PromptSession(
        _PROMPT, history=remembered, completer=completer, complete_while_typing=False, key_bindings=keys
    )
    return session.prompt


def _private(path: Path) -> str:
    """Return the file's name, after making it one that only its owner reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    return printable(str(path))
