"""Published cases, the format's texts, and random conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.reference.deepseek_v4_chat import TASKS

CASES = Path(__file__).parent / "cases"
TEXTS = json.loads((CASES / "texts.json").read_text(encoding="utf-8"))
# release, effort as the user says it, effort as the oracle takes it
EFFORTS = [
    ("preview", "none", None),
    ("preview", None, "high"),
    ("preview", "high", "high"),
    ("preview", "max", "max"),
    ("0731", "none", None),
    ("0731", None, "low"),
    ("0731", "low", "low"),
    ("0731", "high", "high"),
    ("0731", "max", "max"),
    ("0813", "max", "max"),
]


def case(name: str) -> dict[str, Any]:
    """Return a published case: `messages`, `prompt`, `reasoning_effort` and perhaps `tools`."""
    return json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))


# characters that formats trip over: JSON's and XML's own, white space, beyond ASCII and beyond 16 bits
texts = st.text(alphabet='ab1 \n\t"\\/<>{}[]:,é中😀', max_size=12)
names = st.text(alphabet="abc_é", min_size=1, max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(names, json_values, max_size=3)
# as OpenAI's API has them, escaped or not, and what a model may have made of them
argument_texts = (
    st.builds(json.dumps, arguments, ensure_ascii=st.booleans(), indent=st.sampled_from([None, 1])) | texts
).filter(lambda text: not _is_json_without_names(text))
schemas = st.fixed_dictionaries({"name": names, "description": texts, "parameters": json_values})
tools = st.lists(schemas.map(lambda schema: {"type": "function", "function": schema}), max_size=2)
tasks = st.sampled_from([None, None, *TASKS])


def _is_json_without_names(text: str) -> bool:
    try:
        return not isinstance(json.loads(text), dict)
    except ValueError:
        return False


@st.composite
def _messages(draw: st.DrawFn) -> dict[str, Any]:
    role = draw(
        st.sampled_from(["system", "developer", "user", "user", "tool", "latest_reminder", *["assistant"] * 3])
    )
    message: dict[str, Any] = {"role": role, "content": draw(texts)}
    if role in ("system", "developer") and draw(st.integers(0, 3)) == 0:
        message["tools"] = draw(tools)
    if role in ("system", "developer") and draw(st.integers(0, 3)) == 0:
        message["response_format"] = draw(st.dictionaries(names, json_values, max_size=2))
    if role in ("user", "assistant", "developer"):
        message["task"] = draw(tasks)
    if role == "tool":
        message["tool_call_id"] = draw(_call_ids)
    if role == "assistant":
        message["content"] = draw(st.none() | texts)
        message["reasoning_content"] = draw(st.none() | texts)
        message["tool_calls"] = draw(st.none() | st.lists(_calls, max_size=3, unique_by=lambda call: call["id"]))
        message["wo_eos"] = draw(st.sampled_from([False, False, True]))
    return message


_call_ids = st.sampled_from(["1", "2", "3"])
_calls = st.builds(
    lambda call_id, name, values: {"id": call_id, "type": "function", "function": {"name": name, "arguments": values}},
    _call_ids,
    names,
    arguments | argument_texts,
)
conversations = st.lists(_messages(), min_size=1, max_size=8)
