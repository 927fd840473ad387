"""Turns: messages as the prompt shows them, tool results inside user turns.

Vocabulary: a *message* is what the caller passes; a *turn* is what the prompt shows, one or more messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dspark_hf.modeling.deepseek_v4.chat.constants import TASK_TOKENS

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "tool", "latest_reminder", "assistant")
# who may offer tools and demand a response format
INSTRUCTING_ROLES = ("system", "developer")
# whom an answer follows
ASKING_ROLES = ("user", "developer")
# the same text under the names that Transformers knows it by, the first of them wins
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: its text, and the fields that only some roles have."""

    role: str
    text: str
    task: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    response_format: Any = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    reasoning: str = ""
    ends_with_eos: bool = True


def merge_turns(messages: Sequence[Message]) -> list[Turn]:
    """Return the turns of a conversation: consecutive user messages and tool results are one user turn.

    Results of tools stand in the order of the calls they answer. A user message after one with a task starts a turn
    of its own.

    Raises:
        ValueError: if a message has an unknown role or task, or a field that its role cannot have.
    """
    turns: list[Turn] = []
    call_order: dict[str, int] = {}
    for group in _grouped(messages):
        turns.append(_merged(group, call_order))
        if turns[-1].tool_calls:
            call_order = _call_order(turns[-1].tool_calls)
    return turns


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[Message]:
    """Return the messages with `tools` on the first one, or on an empty system message before it.

    Raises:
        ValueError: if the first message has tools already.
    """
    if not tools:
        return list(messages)
    first = messages[0]
    if first.get("role") not in INSTRUCTING_ROLES:
        return [{"role": "system", "tools": tools}, *messages]
    if first.get("tools"):
        raise ValueError(
            "`tools` must be given once, got the argument and the field of the first message. Leave one of them out."
        )
    return [{**first, "tools": tools}, *messages[1:]]


def drop_developers(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns without developer turns that another user or developer turn follows."""
    last = last_asking_index(turns)
    return [turn for index, turn in enumerate(turns) if turn.role != "developer" or index >= last]


def last_asking_index(turns: Sequence[Turn]) -> int:
    """Return the index of the last user or developer turn, -1 if there is none."""
    return max((index for index, turn in enumerate(turns) if turn.role in ASKING_ROLES), default=-1)


def with_task(turn: Turn, task: str | None) -> Turn:
    """Return the turn with `task`, unchanged if that is None.

    Raises:
        ValueError: if there is no such task.
    """
    if task is None:
        return turn
    if task not in TASK_TOKENS:
        raise ValueError(f"`task` must be one of {', '.join(TASK_TOKENS)}, got {task!r}. Pass one of them or None.")
    return replace(turn, task=task)


def _grouped(messages: Sequence[Message]) -> list[list[Message]]:
    groups: list[list[Message]] = []
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"`role` must be one of {', '.join(ROLES)}, got {role!r}. Correct the message.")
        if groups and _joins(message, groups[-1][0]):
            groups[-1].append(message)
        else:
            groups.append([message])
    return groups


def _joins(message: Message, first: Message) -> bool:
    if message["role"] not in ("user", "tool") or first["role"] not in ("user", "tool"):
        return False
    return message["role"] == "tool" or first["role"] == "tool" or first.get("task") is None


def _merged(group: Sequence[Message], call_order: Mapping[str, int]) -> Turn:
    first = group[0]
    if first["role"] in ("user", "tool"):
        for message in group:
            _check_fields(message)
        task = first.get("task") if first["role"] == "user" else None
        return with_task(Turn(role="user", text=_user_text(group, call_order)), task)
    _check_fields(first)
    turn = Turn(
        role=first["role"],
        text=_text(first.get("content"), first["role"]),
        tools=first.get("tools") or (),
        response_format=first.get("response_format"),
        tool_calls=first.get("tool_calls") or () if first["role"] == "assistant" else (),
        reasoning=_reasoning(first),
        ends_with_eos=not first.get("wo_eos"),
    )
    return with_task(turn, first.get("task"))


def _check_fields(message: Message) -> None:
    for field in ("tools", "response_format"):
        if message.get(field) and message["role"] not in INSTRUCTING_ROLES:
            raise ValueError(
                f"`{field}` must stand on a system or developer message, got one on a {message['role']} message. "
                "Move it to the first message."
            )


def _user_text(group: Sequence[Message], call_order: Mapping[str, int]) -> str:
    results = [message for message in group if message["role"] == "tool"]
    # a stable sort: results of unknown calls count as the first call's
    results.sort(key=lambda result: call_order.get(result.get("tool_call_id") or "", 0))
    remaining = iter(results)
    parts = [
        _tool_result(next(remaining)) if message["role"] == "tool" else _text(message.get("content"), "user")
        for message in group
    ]
    return "\n\n".join(parts)


def _tool_result(message: Message) -> str:
    return f"<tool_result>{_text(message.get('content'), 'tool')}</tool_result>"


def _text(content: Any, role: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        return "\n\n".join(_part_text(part, role) for part in content)
    raise ValueError(
        f"`content` must be text or a list of parts, got {_short(content)} on a {role} message. Pass its text."
    )


def _part_text(part: Mapping[str, Any], role: str) -> str:
    if part.get("type") == "text":
        return str(part.get("text") or "")
    if role == "tool":
        return f"[Unsupported {part.get('type')}]"
    raise ValueError(
        f"`content` must have parts of type 'text' only, got {part.get('type')!r} on a {role} message. "
        "Leave out what is not text."
    )


def _reasoning(message: Message) -> str:
    return next((message[field] for field in _REASONING_FIELDS if message.get(field) is not None), "")


def _call_order(tool_calls: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    ids = [call.get("id") or call.get("function", {}).get("id") for call in tool_calls]
    return {call_id: index for index, call_id in enumerate(ids) if call_id}


def _short(value: Any) -> str:
    try:
        shown = json.dumps(value, ensure_ascii=False)
    except TypeError:
        shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
