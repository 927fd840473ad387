"""Read responses of DeepSeek-V4 as they are written, also ones that are cut off or not quite well-formed.

A call is read whole or not at all, and no markup comes out as content: text that may be the beginning of markup is
held back until more of it is there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dspark_hf.modeling.deepseek_v4.chat.constants import DSML, EOS, THINK_END, THINK_START
from dspark_hf.modeling.deepseek_v4.chat.responses import Response, ToolCall

_OPEN, _CLOSE = f"<{DSML}", f"</{DSML}"
# `function_calls` is what DeepSeek-V3.2 calls its block
_BLOCK_TAG = re.compile(rf"(</?){DSML}(?:tool_calls|function_calls)\s*>")
_TAG = re.compile(rf"</?{DSML}[^<>]*>?")
_INVOKE = f"{_OPEN}invoke"
_INVOKE_START = re.compile(rf'{_INVOKE}\s+name="([^\n]+?)"\s*(/?)>')
_INVOKE_END = re.compile(rf"{_CLOSE}invoke\s*>")
# where a call ends whose own end is missing
_AFTER_INVOKE = re.compile(rf"{_INVOKE}\b|{_CLOSE}(?:tool_calls|function_calls)\s*>|{re.escape(EOS)}")
_PARAMETER = re.compile(
    rf'\s*{_OPEN}parameter\s+name="([^\n]*?)"(?:\s+string="(true|false)")?\s*>(.*?){_CLOSE}parameter\s*>', re.DOTALL
)
_MARKUP = (_OPEN, _CLOSE, EOS, THINK_START, THINK_END)
_THINK_MARKUP = (THINK_END, THINK_START, EOS)
_SHOWN = 40


@dataclass(frozen=True)
class ResponseDelta:
    """What a piece of a response added: text to append, and calls that are whole now."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


class ResponseReader:
    """Read a response piece by piece.

    Args:
        is_thinking: whether the prompt ended with `<think>`; False for `reasoning_effort="none"`.

    Example:

        >>> reader = ResponseReader()
        >>> [reader.feed(piece).content for piece in ("Easy.</th", "ink>It is", " 4", "<｜end▁of▁sentence｜>")]
        ['', 'It is', ' 4', '']
        >>> reader.finish()
        Response(reasoning='Easy.', content='It is 4', tool_calls=[])
    """

    def __init__(self, *, is_thinking: bool = True):
        self._is_thinking = is_thinking
        self._state: Literal["reasoning", "content", "calls", "over"] = "reasoning" if is_thinking else "content"
        self._buffer = ""
        self._reasoning, self._content = "", ""
        self._calls: list[ToolCall] = []
        self._problems: list[str] = []
        self._has_block = False
        # white space behind calls comes out only before text
        self._is_behind_calls = False
        self._told = (0, 0, 0)

    def feed(self, text: str) -> ResponseDelta:
        """Read the next piece, decoded with special tokens, and return what it added."""
        self._buffer += text
        while self._step():
            pass
        start, self._told = self._told, (len(self._reasoning), len(self._content), len(self._calls))
        return ResponseDelta(self._reasoning[start[0] :], self._content[start[1] :], self._calls[start[2] :])

    def finish(self) -> Response:
        """Return the whole response; what was held back as the possible beginning of markup is left out of it."""
        problems = list(self._problems)
        is_cut = self._state != "over"
        if is_cut:
            problems.append(f"There is no {EOS}: the response was cut off, or decoded without special tokens.")
            if self._buffer.strip():
                problems.append(f"What may be unfinished markup is left out: {_short(self._buffer)}.")
        reasoning = self._reasoning if self._is_thinking else None
        return Response(reasoning, self._content, list(self._calls), is_cut, problems)

    def _step(self) -> bool:
        """Read as far as the buffer allows; return whether there may be more to read."""
        if self._state == "reasoning":
            return self._read_reasoning()
        if self._state == "content":
            return self._read_content()
        if self._state == "calls":
            return self._read_calls()
        if self._buffer.strip():
            self._note(f"What follows {EOS} is left out: {_short(self._buffer)}.")
        self._buffer = ""
        return False

    def _read_reasoning(self) -> bool:
        end, token = _first(self._buffer, _THINK_MARKUP)
        self._reasoning += self._take(end)
        if token is None:
            return False
        self._take(len(token))
        if token == THINK_START:
            self._note(f"{THINK_START} stands in the reasoning, which the prompt had opened.")
        elif token == THINK_END:
            self._state = "content"
        else:
            self._note(f"The reasoning has no {THINK_END}; calls in it are not read.")
            self._state = "over"
        return True

    def _read_content(self) -> bool:
        end, token = _first(self._buffer, _MARKUP)
        text = self._buffer[:end]
        # the empty line before calls is theirs
        may_be_theirs = token in (None, _OPEN, _CLOSE)
        num_breaks = min(len(text) - len(text.rstrip("\n")), 2) if may_be_theirs else 0
        if self._is_behind_calls and not text.strip():
            if token is None:
                return False
        else:
            self._is_behind_calls = False
            self._content += text[: end - num_breaks]
        self._take(end - num_breaks if token is None else end)
        if token is None:
            return False
        if token in (_OPEN, _CLOSE):
            return self._read_tag()
        self._take(len(token))
        if token == EOS:
            self._state = "over"
        else:
            self._note(f"{token} stands in the content.")
        return True

    def _read_tag(self) -> bool:
        """Read the tag that the buffer begins with, if all of it is there: one that opens or closes calls."""
        if self._buffer.startswith(_INVOKE):
            if self._state == "content":
                self._note("A call stands outside a block of tool calls.")
                self._state, self._has_block = "calls", False
                return True
            return self._read_call()
        tag = _TAG.match(self._buffer)
        assert tag is not None
        if not tag[0].endswith(">") and tag.end() == len(self._buffer):
            return False
        self._take(tag.end())
        block = _BLOCK_TAG.fullmatch(tag[0])
        if block is not None and self._state == "content" and block[1] == "<":
            self._state, self._has_block = "calls", True
        elif block is not None and self._state == "calls" and block[1] == "</":
            self._state, self._is_behind_calls = "content", True
        else:
            self._note(f"A tag is left out that has no place here: {_short(tag[0])}.")
        return True

    def _read_calls(self) -> bool:
        self._buffer = self._buffer.lstrip()
        end, token = _first(self._buffer, (_OPEN, _CLOSE, EOS))
        if end > 0 and self._has_block:
            self._note(f"Text among the tool calls is left out: {_short(self._take(end))}.")
            return True
        if end > 0 or token == EOS:
            if self._has_block:
                self._note("A block of tool calls has no end.")
            # a call without a block around it ends with itself
            self._state, self._is_behind_calls = "content", True
            return True
        return token is not None and self._read_tag()

    def _read_call(self) -> bool:
        """Read a call from its start to its end, if both are there."""
        start = _INVOKE_START.match(self._buffer)
        if start is not None and start[2]:
            self._calls.append(ToolCall(start[1], {}))
            self._note(f"The call of {start[1]!r} closes itself.")
            self._take(start.end())
            return True
        first = len(_INVOKE)
        end, other = _INVOKE_END.search(self._buffer, first), _AFTER_INVOKE.search(self._buffer, first)
        if end is None and other is None:
            return False
        is_closed = end is not None and (other is None or end.start() < other.start())
        boundary = end if is_closed else other
        assert boundary is not None
        # the end of the block ends its last call too
        is_whole = is_closed or boundary[0].startswith(_CLOSE)
        call = None
        if start is not None and start.end() <= boundary.start() and is_whole:
            call = self._call(start[1], self._buffer[start.end() : boundary.start()])
        if call is None:
            self._note(f"A call is left out, which is not well-formed: {_short(self._buffer[: boundary.start()])}.")
        else:
            self._calls.append(call)
            if not is_closed:
                self._note(f"The call of {call.name!r} has no end.")
        self._take(boundary.end() if is_closed else boundary.start())
        return True

    def _call(self, name: str, body: str) -> ToolCall | None:
        """Return a call, or None unless its parameters are all there, each once."""
        arguments: dict[str, Any] = {}
        position = 0
        while parameter := _PARAMETER.match(body, position):
            key, flag, value = parameter.groups()
            if key in arguments or DSML in key + value:
                return None
            arguments[key] = value if flag == "true" else self._decoded(key, flag, value)
            position = parameter.end()
        return None if DSML in name or body[position:].strip() else ToolCall(name, arguments)

    def _decoded(self, name: str, flag: str | None, value: str) -> Any:
        if flag is None:
            self._note(f"The parameter {name!r} does not say whether it is text.")
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            if flag is not None:
                self._note(f"The parameter {name!r} is no JSON, and taken for text: {_short(value)}.")
            return value

    def _take(self, num_characters: int) -> str:
        """Take text off the buffer."""
        text, self._buffer = self._buffer[:num_characters], self._buffer[num_characters:]
        return text

    def _note(self, problem: str) -> None:
        self._problems.append(problem)


def _first(text: str, tokens: tuple[str, ...]) -> tuple[int, str | None]:
    """Return where the first of `tokens` stands and which that is or, with None, where the beginning of one may be."""
    found = [(position, token) for token in tokens if (position := text.find(token)) >= 0]
    if found:
        return min(found)
    longest = max(map(len, tokens)) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    held = next((size for size in sizes if any(token.startswith(text[-size:]) for token in tokens)), 0)
    return len(text) - held, None


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
