"""What a target answered, in its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name and its arguments, decoded."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Response:
    """What a target answered.

    Args:
        reasoning: what stands before `</think>`; None for a response to a prompt without reasoning.
        content: what the user reads, empty if there are only tool calls.
        tool_calls: the calls, in order.
        is_cut: whether the response ends before EOS, as at `max_new_tokens`; only a tolerant reading returns such.
        problems: what a tolerant reading mended or left out, in plain words; empty for a well-formed response.
    """

    reasoning: str | None
    content: str
    tool_calls: list[ToolCall] = field(default_factory=list)
    is_cut: bool = field(default=False, repr=False)
    problems: list[str] = field(default_factory=list, repr=False)

    def to_message(self) -> dict[str, Any]:
        """Return the assistant message to append to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message
