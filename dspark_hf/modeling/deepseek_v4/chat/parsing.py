"""Parse responses of DeepSeek-V4 into reasoning, content and tool calls."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from dspark_hf.modeling.deepseek_v4.chat.constants import DSML, EOS, SPECIAL_TOKENS, THINK_END
from dspark_hf.modeling.deepseek_v4.chat.reading import ResponseReader
from dspark_hf.modeling.deepseek_v4.chat.responses import Response, ToolCall

_CALLS_START = f"\n\n<{DSML}tool_calls>\n"
_CALLS_END = f"</{DSML}tool_calls>"
_INVOKE_START = re.compile(rf'<{DSML}invoke name="([^\n]+?)">\n')
_INVOKE_END = f"</{DSML}invoke>\n"
_PARAMETER_START = re.compile(rf'<{DSML}parameter name="([^\n]*?)" string="(true|false)">')
_PARAMETER_END = f"</{DSML}parameter>"
_SHOWN = 40


def parse_response(text: str, *, is_thinking: bool = True, tolerant: bool = False) -> Response:
    """Return the reasoning, the content and the tool calls of a response.

    Args:
        text: all that was generated and nothing of the prompt, up to and with EOS; decode with
            `skip_special_tokens=False`.
        is_thinking: whether the prompt ended with `<think>`; False for `reasoning_effort="none"`.
        tolerant: whether to read as much as there is of a response that is cut off or not quite well-formed, as
            `ResponseReader` does; `is_cut` and `problems` then say what is not as it should be.

    Raises:
        ValueError: if the response is malformed and `tolerant` is false; the message says what is wrong and where.

    Example:

        >>> parse_response("2 + 2 is easy.</think>4<｜end▁of▁sentence｜>")
        Response(reasoning='2 + 2 is easy.', content='4', tool_calls=[])
    """
    if tolerant:
        reader = ResponseReader(is_thinking=is_thinking)
        reader.feed(text)
        return reader.finish()
    if not text.endswith(EOS):
        _malformed(
            text,
            f"end with {EOS}",
            len(text),
            "It was cut off (`tolerant=True` reads so much as there is), or decoded without special tokens.",
        )
    end = len(text) - len(EOS)
    reasoning, content_start = _split_reasoning(text) if is_thinking else (None, 0)
    calls_start = text.find(_CALLS_START, content_start)
    content_end = end if calls_start < 0 else calls_start
    _refuse_special_tokens(text, content_start, content_end, SPECIAL_TOKENS)
    calls = [] if calls_start < 0 else _parse_calls(text, calls_start + len(_CALLS_START), end)
    return Response(reasoning, text[content_start:content_end], calls)


def _split_reasoning(text: str) -> tuple[str, int]:
    end = text.find(THINK_END)
    if end < 0:
        _malformed(text, f"have {THINK_END} after its reasoning", 0, "Pass `is_thinking=False` if none was asked for.")
    _refuse_special_tokens(text, 0, end, SPECIAL_TOKENS)
    return text[:end], end + len(THINK_END)


def _parse_calls(text: str, position: int, end: int) -> list[ToolCall]:
    calls = []
    while not text.startswith(_CALLS_END, position):
        call, position = _parse_call(text, position, end)
        calls.append(call)
    if not calls:
        _malformed(text, "have a call in its block of tool calls", position)
    position += len(_CALLS_END)
    if position != end:
        _malformed(text, f"have nothing but {EOS} after its tool calls", position)
    return calls


def _parse_call(text: str, position: int, end: int) -> tuple[ToolCall, int]:
    opening = _INVOKE_START.match(text, position, end)
    if opening is None:
        _malformed(text, f'have <{DSML}invoke name="..."> and a line break, or {_CALLS_END}, here', position)
    _refuse_special_tokens(text, opening.start(1), opening.end(1), (DSML, EOS))
    position = opening.end()
    # without parameters, an empty line stands where they would
    if text.startswith("\n" + _INVOKE_END, position):
        position += 1
    arguments: dict[str, Any] = {}
    while not text.startswith(_INVOKE_END, position):
        start = position
        name, value, position = _parse_parameter(text, start, end)
        if name in arguments:
            _malformed(text, f"have each parameter of a call once, not {name!r} twice", start)
        arguments[name] = value
    return ToolCall(opening[1], arguments), position + len(_INVOKE_END)


def _parse_parameter(text: str, position: int, end: int) -> tuple[str, Any, int]:
    opening = _PARAMETER_START.match(text, position, end)
    if opening is None:
        _malformed(
            text,
            f'have <{DSML}parameter name="..." string="true|false">, or </{DSML}invoke> and a line break, here',
            position,
        )
    _refuse_special_tokens(text, opening.start(1), opening.end(1), (DSML, EOS))
    value_start = opening.end()
    value_end = text.find(_PARAMETER_END, value_start, end)
    if value_end < 0:
        _malformed(text, f"have {_PARAMETER_END} after the value of {opening[1]!r}", value_start)
    _refuse_special_tokens(text, value_start, value_end, (DSML, EOS))
    value = text[value_start:value_end]
    position = value_end + len(_PARAMETER_END)
    if not text.startswith("\n", position):
        _malformed(text, f"have a line break after {_PARAMETER_END}", position)
    is_string = opening[2] == "true"
    return opening[1], value if is_string else _decoded(text, value, value_start), position + 1


def _decoded(text: str, value: str, position: int) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        _malformed(text, f'have JSON in a parameter with string="false" ({error.msg})', position + error.pos)
    except (ValueError, RecursionError) as error:
        # numbers of thousands of digits, lists in lists in lists
        _malformed(text, f'have JSON in a parameter with string="false" ({error})', position)


def _refuse_special_tokens(text: str, start: int, end: int, tokens: tuple[str, ...]) -> None:
    found = [(position, token) for token in tokens if (position := text.find(token, start, end)) >= 0]
    if found:
        position, token = min(found)
        _malformed(
            text,
            f"not have {token} here",
            position,
            "Pass one response without its prompt, and the right `is_thinking`.",
        )


def _malformed(
    text: str, rule: str, position: int, remedy: str = "Sample again, or read the text as it is."
) -> NoReturn:
    start = max(0, position - _SHOWN)
    before = ("..." if start else "") + text[start:position]
    after = text[position : position + _SHOWN]
    shown = repr(before + after)
    raise ValueError(f"`text` must {rule}, got {after!r} at character {position} (in {shown}). {remedy}")
