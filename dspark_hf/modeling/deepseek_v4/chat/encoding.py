"""Encode conversations into prompts of DeepSeek-V4. No tokenizer and no model is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_hf.modeling.deepseek_v4.chat.constants import (
    ASSISTANT,
    BOS,
    DEFAULT_RELEASE,
    DSML,
    EOS,
    LATEST_REMINDER,
    NO_REASONING,
    RESPONSE_FORMAT_BEFORE_SCHEMA,
    TASK_TOKENS,
    THINK_END,
    THINK_START,
    TOOLS_AFTER_SCHEMAS,
    TOOLS_BEFORE_SCHEMAS,
    USER,
)
from dspark_hf.modeling.deepseek_v4.chat.efforts import effort_text, efforts_of, with_switches
from dspark_hf.modeling.deepseek_v4.chat.turns import (
    ASKING_ROLES,
    Message,
    Turn,
    drop_developers,
    last_asking_index,
    merge_turns,
    with_task,
    with_tools,
)


def encode_messages(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reasoning_effort: str | None = None,
    release: str = DEFAULT_RELEASE,
    drop_reasoning: bool = True,
    task: str | None = None,
    add_generation_prompt: bool = True,
    **switches: Any,
) -> str:
    """Return the prompt of a conversation.

    Args:
        messages: the conversation. Roles are `system`, `developer`, `user`, `tool`, `latest_reminder` and
            `assistant`; see the documentation for the fields.
        tools: JSON schemas in OpenAI's form; the same as the field `tools` of the first message, which must be a
            system or developer message (otherwise an empty system message is put before it).
        reasoning_effort: `"none"` (Non-think), or an effort of the release: `"high"` and `"max"` for the preview,
            `"low"`, `"high"` and `"max"` since 0731. None reasons at the release's default effort.
        release: `"preview"`, `"0731"` or `"0813"`; decides what the efforts mean.
        drop_reasoning: whether to leave out the reasoning before the last user turn. Conversations with tools always
            keep it.
        task: the quick-instruction task of the last turn: `"action"`, `"query"`, `"authority"`, `"domain"`,
            `"title"` or `"read_url"`.
        add_generation_prompt: whether a prompt that ends with a user turn goes on to where the answer starts.
        switches: other engines' names: `thinking` or `enable_thinking`, true or false, and `thinking_mode`,
            `"thinking"` or `"chat"`, for `reasoning_effort`. None says nothing; all others are refused.

    Raises:
        ValueError: if an argument or a message cannot be encoded.

    Example:

        >>> encode_messages([{"role": "user", "content": "Hi"}])
        '<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>'
        >>> encode_messages([{"role": "user", "content": "Hi"}], reasoning_effort="none")
        '<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>'
    """
    if not messages:
        raise ValueError("`messages` must hold at least one message, got none. Add a user message.")
    efforts_of(release)
    reasoning_effort = with_switches(reasoning_effort, switches)
    opening = BOS + effort_text(reasoning_effort, release)
    turns = merge_turns(with_tools(messages, tools))
    turns[-1] = with_task(turns[-1], task)
    is_thinking = reasoning_effort != NO_REASONING
    drops = is_thinking and drop_reasoning and not any(turn.tools for turn in turns)
    if drops:
        turns = drop_developers(turns)
    # turns from here on show their reasoning
    first_thinking = (last_asking_index(turns) if drops else 0) if is_thinking else len(turns)
    prompt = opening
    for index, turn in enumerate(turns):
        thinks = index >= first_thinking
        follows_task = index > 0 and turns[index - 1].task is not None
        next_role = turns[index + 1].role if index + 1 < len(turns) else None
        prompt += _turn(turn, has_reasoning=thinks and not follows_task)
        if next_role not in (None, "assistant", "latest_reminder"):
            continue
        if turn.task is not None:
            prompt += _task(turn.task, is_thinking)
        elif turn.role in ASKING_ROLES and (next_role or add_generation_prompt):
            prompt += _assistant(thinks)
    return prompt


def _turn(turn: Turn, *, has_reasoning: bool) -> str:
    if turn.role == "assistant":
        reasoning = turn.reasoning + THINK_END if has_reasoning else ""
        return reasoning + turn.text + _tool_calls(turn.tool_calls) + (EOS if turn.ends_with_eos else "")
    opening = {"system": "", "developer": USER, "user": USER, "latest_reminder": LATEST_REMINDER}[turn.role]
    return opening + turn.text + _instructions(turn)


def _instructions(turn: Turn) -> str:
    text = ""
    if turn.tools:
        schemas = "\n".join(_schema(tool) for tool in turn.tools)
        text += "\n\n" + TOOLS_BEFORE_SCHEMAS + schemas + TOOLS_AFTER_SCHEMAS
    if turn.response_format:
        text += "\n\n" + RESPONSE_FORMAT_BEFORE_SCHEMA + _json(turn.response_format)
    return text


def _schema(tool: Any) -> str:
    if not isinstance(tool, Mapping):
        raise ValueError(
            f"`tools` must be JSON schemas, got {tool!r}. Pass functions through `transformers.utils.get_json_schema`."
        )
    return _json(tool.get("function", tool))


def _task(task: str, is_thinking: bool) -> str:
    # what to do next is the assistant's to say; all other tasks are about the turn itself
    return (_assistant(is_thinking) if task == "action" else "") + TASK_TOKENS[task]


def _assistant(thinks: bool) -> str:
    return ASSISTANT + (THINK_START if thinks else THINK_END)


def _tool_calls(tool_calls: Sequence[Mapping[str, Any]]) -> str:
    if not tool_calls:
        return ""
    calls = "\n".join(_tool_call(call.get("function", call)) for call in tool_calls)
    return f"\n\n<{DSML}tool_calls>\n{calls}\n</{DSML}tool_calls>"


def _tool_call(function: Mapping[str, Any]) -> str:
    name = function.get("name")
    if not name:
        raise ValueError(f"`tool_calls` must name the function, got {function!r}. Add its `name`.")
    arguments = _arguments(function.get("arguments", {}), name)
    parameters = "\n".join(_parameter(key, value) for key, value in arguments.items())
    return f'<{DSML}invoke name="{name}">\n{parameters}\n</{DSML}invoke>'


def _arguments(arguments: Any, name: str) -> Mapping[str, Any]:
    decoded = arguments
    if isinstance(arguments, str):
        try:
            decoded = json.loads(arguments)
        except json.JSONDecodeError:
            return {"arguments": arguments}
    if not isinstance(decoded, Mapping):
        raise ValueError(
            f"`arguments` must be an object, or the JSON text of one, got {arguments!r} for {name}. "
            "Name the parameters."
        )
    return decoded


def _parameter(name: str, value: Any) -> str:
    is_string = isinstance(value, str)
    text = value if is_string else _json(value)
    return f'<{DSML}parameter name="{name}" string="{str(is_string).lower()}">{text}</{DSML}parameter>'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
