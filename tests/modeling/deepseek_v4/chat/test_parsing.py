"""Responses: what was encoded is read back, and what is malformed is named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_hf.modeling.deepseek_v4.chat import Response, ToolCall, encode_messages, parse_response
from tests.modeling.deepseek_v4.chat.conversations import arguments, case, names, texts

EOS = "<｜end▁of▁sentence｜>"
QUESTION = [{"role": "user", "content": "Hi"}]


def calls(*lines):
    """Return a response that is one block of tool calls."""
    return "\n".join(["\n\n<｜DSML｜tool_calls>", *lines, "</｜DSML｜tool_calls>"]) + EOS


def test_published_case():
    """Published responses are not read back."""
    answers = [text + EOS for text in case("tools")["prompt"].split("<｜Assistant｜><think>")[1:]]
    first, last = (parse_response(text[: text.index(EOS) + len(EOS)]) for text in answers)
    assert first == Response(
        reasoning="The user wants to know the weather in Beijing. I should use the get_weather tool.",
        content="",
        tool_calls=[ToolCall("get_weather", {"location": "Beijing", "unit": "celsius"})],
    )
    assert last.reasoning == "Got the weather data. Let me format a nice response."
    assert last.content.startswith("The weather in Beijing is currently sunny")
    assert last.tool_calls == []


@settings(deadline=None, max_examples=40)
@given(st.none() | texts, texts, st.lists(st.builds(ToolCall, names, arguments), max_size=3))
def test_round_trip(reasoning, content, tool_calls):
    """A response that is read and encoded again comes out changed, types of arguments included."""
    response = Response(reasoning, content, tool_calls)
    effort = "none" if reasoning is None else None
    prompt = encode_messages(QUESTION, reasoning_effort=effort)
    text = encode_messages([*QUESTION, response.to_message()], reasoning_effort=effort).removeprefix(prompt)
    parsed = parse_response(text, is_thinking=reasoning is not None)
    assert parsed == response
    # True == 1 == 1.0
    assert repr(parsed) == repr(response)


MALFORMED = {
    "cut off": ("Hm.</think>Ye", {}, r"end with <｜end▁of▁sentence｜>, got '' at character 13"),
    "reasoning without end": ("Hm." + EOS, {}, r"have </think> after its reasoning, got 'Hm"),
    "with prompt": ("<think>Hm.</think>Yes" + EOS, {}, r"not have <think> here, got '<think>Hm.* at character 0"),
    "reasoning without being asked": (
        "Hm.</think>Yes" + EOS,
        {"is_thinking": False},
        r"not have </think> here.* at character 3",
    ),
    "two responses": ("</think>A" + EOS + "B" + EOS, {}, r"not have <｜end▁of▁sentence｜> here.* at character 9 "),
    "two reasonings": ("a</think>b</think>c" + EOS, {}, r"not have </think> here.* at character 10 "),
    "calls without empty line": ("</think>" + calls().lstrip(), {}, r"not have ｜DSML｜ here"),
    "calls inside reasoning": (calls() + "</think>" + EOS, {}, r"not have .* at character 3 "),
    "no call": ("</think>" + calls(), {}, r"have a call in its block of tool calls"),
    "text after calls": (
        "</think>" + calls('<｜DSML｜invoke name="f">', "</｜DSML｜invoke>").replace(EOS, " Done." + EOS),
        {},
        r"nothing but <｜end▁of▁sentence｜> after its tool calls, got ' Done",
    ),
    "call without name": (
        "</think>" + calls("<｜DSML｜invoke>"),
        {},
        r"have <｜DSML｜invoke name=.*got '<｜DSML｜invoke>",
    ),
    "call in a name": (
        "</think>" + calls('<｜DSML｜invoke name="f</｜DSML｜invoke>">', "", "</｜DSML｜invoke>"),
        {},
        r"not have ｜DSML｜ here",
    ),
    "call in a parameter's name": (
        "</think>" + calls('<｜DSML｜invoke name="f">', '<｜DSML｜parameter name="x｜DSML｜" string="true">1'),
        {},
        r"not have ｜DSML｜ here",
    ),
    "call without end": (
        "</think>" + calls('<｜DSML｜invoke name="f">'),
        {},
        r"</｜DSML｜invoke> and a line break, here",
    ),
    "block without end": (
        "</think>" + calls('<｜DSML｜invoke name="f">', "</｜DSML｜invoke>").replace("</｜DSML｜tool_calls>", ""),
        {},
        r"or </｜DSML｜tool_calls>, here",
    ),
    "parameter without flag": (
        "</think>" + calls('<｜DSML｜invoke name="f">', '<｜DSML｜parameter name="x">1</｜DSML｜parameter>'),
        {},
        r"have <｜DSML｜parameter name=.* string=",
    ),
    "parameter without end": (
        "</think>" + calls('<｜DSML｜invoke name="f">', '<｜DSML｜parameter name="x" string="true">1'),
        {},
        r"have </｜DSML｜parameter> after the value of 'x'",
    ),
    "parameter inside parameter": (
        "</think>"
        + calls(
            '<｜DSML｜invoke name="f">',
            '<｜DSML｜parameter name="x" string="true">1',
            '<｜DSML｜parameter name="y" string="true">2</｜DSML｜parameter>',
        ),
        {},
        r"not have ｜DSML｜ here",
    ),
    "parameters on one line": (
        "</think>"
        + calls(
            '<｜DSML｜invoke name="f">',
            '<｜DSML｜parameter name="x" string="true">1</｜DSML｜parameter></｜DSML｜invoke>',
        ),
        {},
        r"have a line break after </｜DSML｜parameter>",
    ),
    "parameter twice": (
        "</think>"
        + calls('<｜DSML｜invoke name="f">', *['<｜DSML｜parameter name="x" string="true">1</｜DSML｜parameter>'] * 2),
        {},
        r"each parameter of a call once, not 'x' twice",
    ),
    "value that is too deep": (
        "</think>"
        + calls(
            '<｜DSML｜invoke name="f">',
            f'<｜DSML｜parameter name="x" string="false">{"[" * 100_000}</｜DSML｜parameter>',
        ),
        {},
        r"have JSON in a parameter with string=\"false\" \(",
    ),
    "value that is not JSON": (
        "</think>"
        + calls('<｜DSML｜invoke name="f">', '<｜DSML｜parameter name="x" string="false">one</｜DSML｜parameter>'),
        {},
        r"have JSON in a parameter with string=\"false\" \(Expecting value\), got 'one<",
    ),
}


@pytest.mark.parametrize("mistake", MALFORMED)
def test_malformed(mistake):
    """A malformed response is read as something else, or the error does not say what and where."""
    text, options, match = MALFORMED[mistake]
    with pytest.raises(ValueError, match=match):
        parse_response(text, **options)


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="a\n", max_size=3), st.integers(0, 200), st.integers(0, 60))
def test_damaged(content, start, length):
    """A damaged response raises something that is not a ValueError."""
    message = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
    }
    text = encode_messages([*QUESTION, message]).partition("<think>")[2]
    damaged = text[:start] + text[start + length :]
    try:
        assert isinstance(parse_response(damaged), Response)
    except ValueError as error:
        assert str(error).startswith("`text` must ")
