"""Responses read piece by piece, cut off, and not quite well-formed."""

from __future__ import annotations

from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_hf.modeling.deepseek_v4.chat import Response, ResponseReader, ToolCall, encode_messages, parse_response
from tests.modeling.deepseek_v4.chat.conversations import arguments, names, texts

EOS = "<｜end▁of▁sentence｜>"
OPEN, CLOSE = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
PARAMETER = '<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>'
INVOKE = f'<｜DSML｜invoke name="f">\n{PARAMETER}\n</｜DSML｜invoke>'
NAMELESS = INVOKE.replace(' name="f"', "")
CALL = ToolCall("f", {"x": 1})
SPECIAL = ("｜DSML｜", "<｜", "</think", "<think", "｜>")


def read(text, **options):
    """Return a tolerant reading."""
    return parse_response(text, tolerant=True, **options)


def written(response):
    """Return what a target writes for a response."""
    question = [{"role": "user", "content": "Hi"}]
    effort = "none" if response.reasoning is None else None
    prompt = encode_messages(question, reasoning_effort=effort)
    return encode_messages([*question, response.to_message()], reasoning_effort=effort).removeprefix(prompt)


responses = st.builds(Response, st.none() | texts, texts, st.lists(st.builds(ToolCall, names, arguments), max_size=3))


@settings(deadline=None, max_examples=40)
@given(responses)
def test_well_formed_responses_are_read_as_strictly(response):
    """The tolerant reading of a well-formed response is another than the strict one."""
    parsed = read(written(response), is_thinking=response.reasoning is not None)
    assert parsed == response
    assert repr(parsed) == repr(response)


# what models write, by what is wrong with it -> content, calls
SHAPES = {
    "no empty line": (f"Wait.{OPEN}\n{INVOKE}\n{CLOSE}", "Wait.", [CALL]),
    "one line break": (f"Wait.\n{OPEN}\n{INVOKE}\n{CLOSE}", "Wait.", [CALL]),
    "no block": (f"Wait.\n\n{INVOKE}", "Wait.", [CALL]),
    "two calls without a block": (f"{INVOKE}\n{INVOKE}", "", [CALL, CALL]),
    "text behind a call without a block": (f"{INVOKE}\nDone.", "Done.", [CALL]),
    "block of another release": (f"\n\n{OPEN}\n{INVOKE}\n{CLOSE}".replace("tool_calls", "function_calls"), "", [CALL]),
    "line break behind": (f"\n\n{OPEN}\n{INVOKE}\n{CLOSE}\n", "", [CALL]),
    "text behind": (f"Wait.\n\n{OPEN}\n{INVOKE}\n{CLOSE}\nDone.", "Wait.\nDone.", [CALL]),
    "no line breaks": (f"{OPEN}{INVOKE}{CLOSE}".replace("\n", ""), "", [CALL]),
    "no flag": (f"{OPEN}{INVOKE}{CLOSE}".replace(' string="false"', ""), "", [CALL]),
    "no flag, text": (
        f"{OPEN}{INVOKE}{CLOSE}".replace(' string="false">1', ">one"),
        "",
        [ToolCall("f", {"x": "one"})],
    ),
    "bare word": (f"{OPEN}{INVOKE}{CLOSE}".replace(">1<", ">one<"), "", [ToolCall("f", {"x": "one"})]),
    "deep nesting": (
        f"{OPEN}{INVOKE}{CLOSE}".replace(">1<", f">{'[' * 9999}<"),
        "",
        [ToolCall("f", {"x": "[" * 9999})],
    ),
    "one bad call": (f"{OPEN}{INVOKE.replace(PARAMETER, PARAMETER * 2)}{INVOKE}{CLOSE}", "", [CALL]),
    "call without a name": (f"{OPEN}{NAMELESS}{INVOKE}{CLOSE}", "", [CALL]),
    "text in a call": (f"{OPEN}{INVOKE.replace(PARAMETER, 'so ' + PARAMETER)}{CLOSE}", "", []),
    "call that closes itself": (f'{OPEN}<｜DSML｜invoke name="f"/>{INVOKE}{CLOSE}', "", [ToolCall("f", {}), CALL]),
    "call without end": (f"{OPEN}{INVOKE.replace('</｜DSML｜invoke>', '')}{CLOSE}", "", [CALL]),
    "call without end before another": (f"{OPEN}{INVOKE.replace('</｜DSML｜invoke>', '')}{INVOKE}{CLOSE}", "", [CALL]),
    "block without end": (f"\n\n{OPEN}\n{INVOKE}\n", "", [CALL]),
    "text among calls": (f"{OPEN}Now: {INVOKE} and {INVOKE}{CLOSE}", "", [CALL, CALL]),
    "empty block": (f"Hm.\n\n{OPEN}\n{CLOSE}", "Hm.", []),
    "unknown tag": ("A<｜DSML｜x>B</｜DSML｜invoke>C<｜DSML｜", "ABC", []),
    "two reasonings": ("A</think>B<think>C", "ABC", []),
}


SILENT = (
    "no empty line",
    "one line break",
    "no line breaks",
    "block of another release",
    "line break behind",
    "text behind",
    "empty block",
)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_models_write(shape):
    """A call that is there for everyone to see is refused, comes out as content, or is half read."""
    text, content, calls = SHAPES[shape]
    for reasoning in (None, "Hm."):
        whole = text + EOS if reasoning is None else f"{reasoning}</think>{text}{EOS}"
        is_thinking = reasoning is not None
        response = read(whole, is_thinking=is_thinking)
        assert response == Response(reasoning, content, calls, False, response.problems)
        assert not response.is_cut
        # it is refused strictly, and mended with a word, unless that changes nothing that anyone could miss
        with pytest.raises(ValueError, match="`text` must "):
            parse_response(whole, is_thinking=is_thinking)
        assert response.problems or shape in SILENT


@settings(deadline=None, max_examples=40)
@given(responses, st.data())
def test_a_cut_response_is_read_as_far_as_it_goes(response, data):
    """At `max_new_tokens` a half call is taken for a whole one, markup comes out as content, or nothing does."""
    text = written(response)
    is_thinking = response.reasoning is not None
    end = data.draw(st.integers(0, len(text) - 1))
    cut = read(text[:end], is_thinking=is_thinking)
    assert cut.is_cut and cut.problems
    assert (response.reasoning or "").startswith(cut.reasoning or "")
    assert response.content.startswith(cut.content)
    assert response.tool_calls[: len(cut.tool_calls)] == cut.tool_calls
    # what is left out is no more than may be markup, an empty line with it
    whole_text = (response.reasoning or "") + response.content
    if not response.tool_calls:
        marks = len("</think>") if is_thinking else 0
        assert len((cut.reasoning or "") + cut.content) >= min(end - marks, len(whole_text)) - len("\n\n" + EOS)


@settings(deadline=None, max_examples=40)
@given(
    responses | st.sampled_from([Response("Hm.", text, []) for text, _, _ in SHAPES.values()]),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_pieces_add_up_to_the_whole(response, sizes):
    """A stream shows another text than the response has in the end, or takes something back."""
    text = written(response)
    is_thinking = response.reasoning is not None
    reader, rest, deltas = ResponseReader(is_thinking=is_thinking), text, []
    for size in cycle(sizes):
        deltas.append(reader.feed(rest[:size]))
        rest = rest[size:]
        if not rest:
            break
    whole, streamed = read(text, is_thinking=is_thinking), reader.finish()
    assert streamed == reader.finish()
    assert (streamed.reasoning, streamed.content, streamed.tool_calls, streamed.is_cut) == (
        whole.reasoning,
        whole.content,
        whole.tool_calls,
        whole.is_cut,
    )
    assert "".join(delta.reasoning for delta in deltas) == (whole.reasoning or "")
    assert "".join(delta.content for delta in deltas) == whole.content
    assert [call for delta in deltas for call in delta.tool_calls] == whole.tool_calls


def test_text_comes_out_as_it_is_written():
    """A stream holds text back until the response is over."""
    reader = ResponseReader()
    pieces = ["I th", "ink.", "</think>", "It", " is <", "3.", f"\n\n{OPEN}\n{INVOKE}\n", CLOSE, EOS]
    deltas = [reader.feed(piece) for piece in pieces]
    assert [delta.reasoning for delta in deltas] == ["I th", "ink.", *[""] * 7]
    assert [delta.content for delta in deltas] == ["", "", "", "It", " is ", "<3.", "", "", ""]
    assert [len(delta.tool_calls) for delta in deltas] == [0] * 6 + [1, 0, 0]


def test_calls_that_were_only_thought_of_are_not_read():
    """A call in reasoning that never ended is carried out."""
    response = read(f"I could\n\n{OPEN}\n{INVOKE}\n{CLOSE}{EOS}")
    assert response.tool_calls == [] and response.content == ""
    assert response.reasoning.startswith("I could") and "calls in it are not read" in response.problems[0]


def test_what_follows_the_end_is_left_out():
    """A second response runs into the first."""
    response = read(f"A</think>B{EOS}C</think>D{EOS}")
    assert (response.reasoning, response.content) == ("A", "B")
    assert "What follows" in response.problems[0]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([*SPECIAL, OPEN, CLOSE, INVOKE, PARAMETER, EOS, "a", "\n", "</think>"]), max_size=9))
def test_nothing_breaks_the_reader(parts):
    """A strange response raises, or leaks a call as content."""
    response = read("".join(parts), is_thinking=False)
    assert "DSML｜invoke" not in response.content
    assert "DSML｜tool_calls" not in response.content
