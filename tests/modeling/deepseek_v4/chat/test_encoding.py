"""Prompts: the published cases, random conversations against the oracle, and what users do wrong."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_hf.modeling.deepseek_v4.chat import constants, encode_messages
from dspark_hf.modeling.deepseek_v4.chat.efforts import REFUSED_SWITCHES
from tests.modeling.deepseek_v4.chat.conversations import EFFORTS, TEXTS, case, conversations
from tests.reference.deepseek_v4_chat import encode

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def body(messages, **options):
    """Return a prompt without BOS."""
    return encode_messages(messages, **options).removeprefix("<｜begin▁of▁sentence｜>")


@pytest.mark.parametrize("name", ["tools", "dropped_reasoning", "action_task"])
def test_published_cases(name):
    """Prompts differ from what the targets were trained on."""
    published = case(name)
    prompt = published.pop("prompt")
    assert encode_messages(published.pop("messages"), **published) == prompt


def test_texts():
    """A fixed text or a special token is misspelt."""
    tokens = TEXTS["tokens"]
    names = ("BOS", "EOS", "USER", "ASSISTANT", "LATEST_REMINDER", "THINK_START", "THINK_END", "DSML")
    assert {name.lower(): getattr(constants, name) for name in names} | {"tasks": constants.TASK_TOKENS} == tokens
    assert TEXTS["efforts"] == constants.REASONING_EFFORTS
    assert TEXTS["tools"] == constants.TOOLS_BEFORE_SCHEMAS + "{tool_schemas}" + constants.TOOLS_AFTER_SCHEMAS
    assert TEXTS["response_format"] == constants.RESPONSE_FORMAT_BEFORE_SCHEMA + "{schema}"


@settings(deadline=None, max_examples=40)
@given(conversations, st.sampled_from(EFFORTS), st.booleans(), st.booleans())
def test_random_conversations(messages, effort, drop_reasoning, add_generation_prompt):
    """A rule of the format is broken: merging, sorting, dropping, calls, tasks or efforts."""
    release, said, meant = effort
    options = {"release": release, "drop_reasoning": drop_reasoning, "add_generation_prompt": add_generation_prompt}
    expected = encode(copy.deepcopy(messages), TEXTS, effort=meant, **options)
    before = copy.deepcopy(messages)
    assert encode_messages(messages, reasoning_effort=said, **options) == expected
    assert messages == before


def test_tools_go_on_the_first_message():
    """Tools passed as an argument land elsewhere than tools passed as a field."""
    as_field = encode_messages([{**SYSTEM, "tools": [TOOL]}, USER])
    assert encode_messages([SYSTEM, USER], tools=[TOOL]) == as_field
    alone = encode_messages([{"role": "system", "content": "", "tools": [TOOL]}, USER])
    assert encode_messages([USER], tools=[TOOL]) == alone
    assert encode_messages([USER], tools=[]) == encode_messages([USER])
    developer = {"role": "developer", "content": "Search."}
    assert encode_messages([developer], tools=[TOOL]) == encode_messages([{**developer, "tools": [TOOL]}])


def test_tools_in_short_form():
    """Schemas and calls without the wrapper `function` are refused or written otherwise."""
    assert encode_messages([USER], tools=[TOOL["function"]]) == encode_messages([USER], tools=[TOOL])
    call = {"name": "f", "arguments": {"x": 1}}
    short, long = ({"role": "assistant", "tool_calls": [form]} for form in (call, {"function": call}))
    assert encode_messages([USER, short]) == encode_messages([USER, long])


def test_call_without_arguments():
    """A call of a function without parameters loses its empty line."""
    for function in ({"name": "f"}, {"name": "f", "arguments": {}}, {"name": "f", "arguments": "{}"}):
        prompt = encode_messages([USER, {"role": "assistant", "tool_calls": [{"function": function}]}])
        assert '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n' in prompt


def test_results_in_the_order_of_their_calls():
    """Results of parallel calls are swapped, and a target reads one for the other."""

    def calls(*ids):
        return {
            "role": "assistant",
            "tool_calls": [{"id": i, "function": {"name": "f", "arguments": {}}} for i in ids],
        }

    def results(*ids):
        return [{"role": "tool", "tool_call_id": i, "content": i} for i in ids]

    later = body([USER, calls("a", "b"), *results("b"), USER, *results("a"), calls("b", "a"), *results("a", "x", "b")])
    first, second = later.split("<｜User｜><tool_result>")[1:]
    assert first.startswith("a</tool_result>\n\nHi\n\n<tool_result>b</tool_result><｜Assistant｜>")
    # a result of an unknown call counts as the first call's
    assert second.startswith("x</tool_result>\n\n<tool_result>b</tool_result>\n\n<tool_result>a</tool_result>")


@pytest.mark.parametrize("effort", [None, "none"])
def test_task_argument(effort):
    """The argument `task` is lost, or means something else than the field."""
    mode = "</think>" if effort else "<think>"
    assert body([USER], task="query", reasoning_effort=effort) == "<｜User｜>Hi<｜query｜>"
    assert body([USER], task="action", reasoning_effort=effort) == f"<｜User｜>Hi<｜Assistant｜>{mode}<｜action｜>"
    result = {"role": "tool", "tool_call_id": "1", "content": "7"}
    merged = "<｜User｜><tool_result>7</tool_result>\n\nHi<｜domain｜>"
    assert body([result, USER], task="domain", reasoning_effort=effort) == merged


def test_parts():
    """A list of parts is not joined as the released encoder joins the parts of a user turn."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert body([{"role": "user", "content": parts}]) == "<｜User｜>a\n\nb<｜Assistant｜><think>"
    result = {"role": "tool", "content": [*parts, {"type": "image"}]}
    assert "<tool_result>a\n\nb\n\n[Unsupported image]</tool_result>" in body([result])


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_names_of_reasoning(field):
    """Reasoning under a name that Transformers knows is lost."""
    assert "<think>Hm.</think>Yes" in body([USER, {"role": "assistant", "content": "Yes", field: "Hm."}])


AGREEING = [
    ({"thinking": False}, "none"),
    ({"enable_thinking": False}, "none"),
    ({"thinking_mode": "chat"}, "none"),
    ({"thinking": False, "reasoning_effort": "none", "enable_thinking": False}, "none"),
    ({"thinking": True}, None),
    ({"enable_thinking": True, "reasoning_effort": "max"}, "max"),
    ({"thinking_mode": "thinking", "reasoning_effort": "low"}, "low"),
    ({"thinking": None, "documents": None}, None),
]


@pytest.mark.parametrize(("switches", "effort"), AGREEING, ids=str)
def test_switches_of_other_engines_act(switches, effort):
    """A switch by another engine's name is passed over in silence, and the model thinks."""
    assert encode_messages([USER], **switches) == encode_messages([USER], reasoning_effort=effort)


MISTAKES = {
    "no messages": ([], {}, r"`messages` must hold at least one message"),
    "role": ([{"role": "bot"}], {}, r"`role` must be one of system, .*, got 'bot'"),
    "effort": ([USER], {"reasoning_effort": "medium"}, r"one of none, low, high, max for release 0731, got 'medium'"),
    "effort of another release": ([USER], {"reasoning_effort": "low", "release": "preview"}, r"none, high, max for"),
    "switch against effort": ([USER], {"thinking": False, "reasoning_effort": "max"}, r"`thinking` must agree with"),
    "switch against none": ([USER], {"enable_thinking": True, "reasoning_effort": "none"}, r"must agree with"),
    "switches against each other": (
        [USER],
        {"thinking": True, "thinking_mode": "chat"},
        r"`thinking_mode` must agree",
    ),
    "switch as text": ([USER], {"enable_thinking": "false"}, r"`enable_thinking` must be one of true, false, got 'fa"),
    "switch as number": ([USER], {"thinking": 0}, r"`thinking` must be one of true, false, got 0"),
    "mode": ([USER], {"thinking_mode": "fast"}, r"`thinking_mode` must be one of thinking, chat, got 'fast'"),
    **{
        name: (
            [USER],
            {name: [{"title": "A"}]},
            rf"`{name}` must be left out: DeepSeek-V4's prompts have no such switch,",
        )
        for name in REFUSED_SWITCHES
    },
    "release": ([USER], {"release": "v4"}, r"`release` must be one of preview, 0731, 0813, got 'v4'"),
    "task": ([USER], {"task": "sum"}, r"`task` must be one of action, .*, got 'sum'"),
    "task of a message": ([{**USER, "task": "sum"}], {}, r"`task` must be one of action, .*, got 'sum'"),
    "tools twice": ([{**SYSTEM, "tools": [TOOL]}], {"tools": [TOOL]}, r"`tools` must be given once"),
    "tools of a user": ([{**USER, "tools": [TOOL]}], {}, r"`tools` must stand on a system or developer message"),
    "format of a user": ([{**USER, "response_format": {"x": 1}}], {}, r"`response_format` must stand on"),
    "function as tool": ([USER], {"tools": [print]}, r"`tools` must be JSON schemas"),
    "image": ([{"role": "user", "content": [{"type": "image"}]}], {}, r"parts of type 'text' only, got 'image'"),
    "number": ([{"role": "user", "content": 5}], {}, r"`content` must be text or a list of parts, got 5"),
    "nameless call": ([{"role": "assistant", "tool_calls": [{"function": {}}]}], {}, r"must name the function"),
    "list of arguments": (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
        {},
        r"`arguments` must be an object, or the JSON text of one",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    """A mistake gives a wrong prompt in silence, or an error that does not help."""
    messages, options, match = MISTAKES[mistake]
    with pytest.raises(ValueError, match=match):
        encode_messages(messages, **options)
