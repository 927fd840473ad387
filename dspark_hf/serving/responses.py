"""What clients get: whole answers and chunks of streams, as chats and as texts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark_hf.serving.held_text import Delta, TokenLogprobs


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int

    def to_json(self) -> dict[str, int]:
        """Return them and their sum."""
        total = self.prompt_tokens + self.completion_tokens
        return {**vars(self), "total_tokens": total}


@dataclass(frozen=True)
class _Head:
    prefix: str
    model: str
    wants_logprobs: bool
    wants_usage: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _headed(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}

    def _part(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # the API's word for "not in this chunk"
        return self._headed(kind, choices, **({"usage": None} if self.wants_usage else {}))


class ChatForm(_Head):
    """Answers of `/v1/chat/completions`."""

    def __init__(self, model: str, *, wants_logprobs: bool, wants_usage: bool):
        super().__init__("chatcmpl", model, wants_logprobs, wants_usage)

    def whole(self, delta: Delta, reason: str, usage: Usage) -> dict[str, Any]:
        """Return the whole answer."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": self._logprobs(delta), "finish_reason": reason}
        return self._headed("chat.completion", [choice], usage=usage.to_json())

    def opening(self) -> dict[str, Any]:
        """Return the first part of a stream, which says who speaks."""
        return self._chunk({"role": "assistant", "content": ""}, None, None)

    def chunk(self, delta: Delta | None, reason: str | None = None) -> dict[str, Any]:
        """Return a part of a stream."""
        content = {} if delta is None else {"content": delta.text}
        return self._chunk(content, None if delta is None else self._logprobs(delta), reason)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the last part of a stream."""
        return self._headed("chat.completion.chunk", [], usage=usage.to_json())

    def _chunk(self, content: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": content, "logprobs": logprobs, "finish_reason": reason}
        return self._part("chat.completion.chunk", [choice])

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        entries = [
            {**_chat_entry(one.token, one.logprob), "top_logprobs": [_chat_entry(*other) for other in one.top]}
            for one in delta.logprobs
        ]
        return {"content": entries, "refusal": None}


class TextForm(_Head):
    """Answers of `/v1/completions`."""

    def __init__(self, model: str, *, wants_logprobs: bool, wants_usage: bool):
        super().__init__("cmpl", model, wants_logprobs, wants_usage)

    def whole(self, delta: Delta, reason: str, usage: Usage) -> dict[str, Any]:
        """Return the whole answer."""
        return self._headed("text_completion", [self._choice(delta, reason)], usage=usage.to_json())

    def opening(self) -> None:
        """Return nothing: a text begins with text."""
        return

    def chunk(self, delta: Delta | None, reason: str | None = None) -> dict[str, Any]:
        """Return a part of a stream."""
        return self._part("text_completion", [self._choice(delta or Delta(), reason)])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the last part of a stream."""
        return self._headed("text_completion", [], usage=usage.to_json())

    def _choice(self, delta: Delta, reason: str | None) -> dict[str, Any]:
        logprobs = _text_logprobs(delta.logprobs) if self.wants_logprobs else None
        return {"index": 0, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}


def _chat_entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": _finite(logprob), "bytes": list(token.encode("utf-8", "replace"))}


def _text_logprobs(entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    return {
        "tokens": [one.token for one in entries],
        "token_logprobs": [_finite(one.logprob) for one in entries],
        "top_logprobs": [{token: _finite(value) for token, value in one.top} for one in entries],
        "text_offset": [one.offset for one in entries],
    }


def _finite(logprob: float) -> float:
    # JSON has no infinity; this is the API's own word for it
    return max(logprob, -9999.0)
