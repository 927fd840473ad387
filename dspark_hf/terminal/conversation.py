"""The turns of a chat, and how they are written for the target."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dspark_hf.damage import is_text, read_object
from dspark_hf.files import write_whole
from dspark_hf.prompts import Message, Prompt, encode_prompt

_ROLES = ("system", "user", "assistant")


class Conversation:
    """System prompt and turns, asked and answered in turns.

    Args:
        tokenizer: the target's; its chat template writes the turns.
        system: the system prompt; None leaves it to the template.
        template_options: what the template is told besides.

    Attributes:
        turns: user and assistant, in turns.
    """

    def __init__(
        self, tokenizer: Any, system: str | None = None, template_options: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._template_options = dict(template_options or {})
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """System prompt, if there is one, and turns."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + self.turns

    def encode(self, question: str) -> Tensor:
        """Return the tokens `(T,)` that the target reads before it answers a new question.

        Raises:
            ValueError: if the chat template cannot write these turns, such as a system prompt.
        """
        messages = (*self.messages, {"role": "user", "content": question})
        return encode_prompt(Prompt(messages=messages), self._tokenizer, self._template_options)

    def add(self, question: str, answer: str) -> None:
        """Append a question and its answer."""
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, as `read_prompts` and `dspark-hf train` read it.

        Raises:
            ValueError: if a file is there that holds something else.
            OSError: if it cannot be written.
        """
        if path.exists():
            _read(path, "must be new, or hold a conversation that may be replaced")
        write_whole(path, (json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n").encode())

    def load(self, path: Path) -> None:
        """Go on with a saved conversation; what was said here is forgotten.

        Raises:
            ValueError: if the file holds none.
        """
        messages = _read(path, "must be a conversation that /save has written")
        has_system = messages[:1] != [] and messages[0]["role"] == "system"
        self.system = messages[0]["content"] if has_system else None
        self.turns = messages[has_system:]


def _read(path: Path, rule: str) -> list[Message]:
    try:
        messages = read_object(path).get("messages")
    except (OSError, ValueError) as error:
        raise ValueError(f"`FILE` {rule}, got {str(path)!r}: {error}. Name another.") from error
    if not isinstance(messages, list) or not all(map(_is_message, messages)) or not _take_turns(messages):
        raise ValueError(
            f"`FILE` {rule}, got {str(path)!r}, which has no `messages` of user and assistant in turns. Name another."
        )
    return [{key: message[key] for key in ("role", "content")} for message in messages]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("role") in _ROLES and is_text(value.get("content"))


def _take_turns(messages: list[Any]) -> bool:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return len(turns) % 2 == 0 and turns == ["user", "assistant"] * (len(turns) // 2)
