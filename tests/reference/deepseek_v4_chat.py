"""Oracle of the prompt format of DeepSeek-V4: its rules one after another, on plain dictionaries.

Knows nothing of `dspark_hf`.

Takes the format's texts as a dictionary: `efforts` (release -> effort -> text), `tools` (with a place for the schemas)
and `response_format` (with a place for the schema).
"""

from __future__ import annotations

import json
from typing import Any

TASKS = ["action", "query", "authority", "domain", "title", "read_url"]


def encode(
    messages: list[dict[str, Any]],
    texts: dict[str, Any],
    *,
    effort: str | None,
    release: str,
    drop_reasoning: bool = True,
    add_generation_prompt: bool = True,
) -> str:
    """Return the prompt of a conversation; `effort` is None for no reasoning, tools are fields of messages."""
    thinking = effort is not None
    merged = sort_results(merge(messages))
    # rule: tools anywhere keep all reasoning
    drop = thinking and drop_reasoning and not any(message.get("tools") for message in merged)
    if drop:
        merged = drop_earlier(merged)
    out = "<｜begin▁of▁sentence｜>"
    if effort is not None:
        out += texts["efforts"][release][effort]
    last = last_question(merged)
    for i, message in enumerate(merged):
        out += render(merged, i, texts, thinking=thinking, drop=drop, last=last)
        if i + 1 < len(merged) and merged[i + 1]["role"] not in ("assistant", "latest_reminder"):
            continue
        if message.get("task") == "action":
            out += "<｜Assistant｜><think>" if thinking else "<｜Assistant｜></think>"
        if message.get("task"):
            out += "<｜" + message["task"] + "｜>"
        elif message["role"] in ("user", "developer"):
            if i + 1 == len(merged) and not add_generation_prompt:
                continue
            if not thinking or (drop and i < last):
                out += "<｜Assistant｜></think>"
            else:
                out += "<｜Assistant｜><think>"
    return out


def merge(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Apply the rule: tool results, and user texts without a task before them, go into the user turn before them."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        before = merged[-1] if merged else {"role": None}
        if message["role"] == "tool":
            block = {"result": message["content"], "id": message["tool_call_id"]}
            if before["role"] == "user":
                before["blocks"].append(block)
            else:
                merged.append({"role": "user", "blocks": [block]})
        elif message["role"] == "user":
            block = {"text": message["content"]}
            if before["role"] == "user" and not before.get("task"):
                before["blocks"].append(block)
            else:
                merged.append({"role": "user", "blocks": [block], "task": message.get("task")})
        else:
            merged.append(dict(message))
    return merged


def sort_results(merged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Apply the rule: results stand in the order of the latest calls, in the places where results stood."""
    order: dict[str, int] = {}
    for message in merged:
        if message.get("tool_calls"):
            order = {call["id"]: number for number, call in enumerate(message["tool_calls"])}
        if message["role"] == "user":
            places = [i for i, block in enumerate(message["blocks"]) if "result" in block]
            results = [message["blocks"][i] for i in places]
            # an exchange sort of neighbours, which keeps equals in place
            for _ in results:
                for k in range(len(results) - 1):
                    if order.get(results[k]["id"], 0) > order.get(results[k + 1]["id"], 0):
                        results[k], results[k + 1] = results[k + 1], results[k]
            for place, block in zip(places, results, strict=True):
                message["blocks"][place] = block
    return merged


def last_question(merged: list[dict[str, Any]]) -> int:
    """Return where the last user or developer turn is, -1 if nowhere."""
    found = -1
    for i, message in enumerate(merged):
        if message["role"] in ("user", "developer"):
            found = i
    return found


def drop_earlier(merged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Apply the rule: before the last question there are no developer turns and no reasoning."""
    last = last_question(merged)
    kept = []
    for i, message in enumerate(merged):
        if i < last and message["role"] == "developer":
            continue
        if i < last and message["role"] == "assistant":
            message = {key: value for key, value in message.items() if key != "reasoning_content"}
        kept.append(message)
    return kept


def render(
    merged: list[dict[str, Any]], i: int, texts: dict[str, Any], *, thinking: bool, drop: bool, last: int
) -> str:
    """Return one turn, without what follows it."""
    message = merged[i]
    content = message.get("content") or ""
    if message["role"] == "user":
        blocks = [
            "<tool_result>" + block["result"] + "</tool_result>" if "result" in block else block["text"]
            for block in message["blocks"]
        ]
        return "<｜User｜>" + "\n\n".join(blocks)
    if message["role"] == "latest_reminder":
        return "<｜latest_reminder｜>" + content
    if message["role"] in ("system", "developer"):
        out = content if message["role"] == "system" else "<｜User｜>" + content
        if message.get("tools"):
            schemas = [json.dumps(tool["function"], ensure_ascii=False) for tool in message["tools"]]
            out += "\n\n" + texts["tools"].replace("{tool_schemas}", "\n".join(schemas))
        if message.get("response_format"):
            schema = json.dumps(message["response_format"], ensure_ascii=False)
            out += "\n\n" + texts["response_format"].replace("{schema}", schema)
        return out
    out = ""
    after_task = i > 0 and merged[i - 1].get("task")
    if thinking and not after_task and (not drop or i > last):
        out += (message.get("reasoning_content") or "") + "</think>"
    out += content
    if message.get("tool_calls"):
        out += "\n\n<｜DSML｜tool_calls>\n"
        for call in message["tool_calls"]:
            out += render_call(call["function"]["name"], call["function"]["arguments"])
        out += "</｜DSML｜tool_calls>"
    if not message.get("wo_eos"):
        out += "<｜end▁of▁sentence｜>"
    return out


def render_call(name: str, arguments: str | dict[str, Any]) -> str:
    """Return one call and a line break."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {"arguments": arguments}
    assert isinstance(arguments, dict)
    lines = []
    for key, value in arguments.items():
        if isinstance(value, str):
            lines.append(f'<｜DSML｜parameter name="{key}" string="true">{value}</｜DSML｜parameter>')
        else:
            text = json.dumps(value, ensure_ascii=False)
            lines.append(f'<｜DSML｜parameter name="{key}" string="false">{text}</｜DSML｜parameter>')
    return f'<｜DSML｜invoke name="{name}">\n' + "\n".join(lines) + "\n</｜DSML｜invoke>\n"
