"""The parts of the server that need none: text that is held back, and what fields do to logits."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dspark_hf.serving.held_text import Delta, HeldText, TokenLogprobs

_few = st.text("ab", min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(_few, max_size=3))
@example(["ba", "b"], ["a", "bab"])
def test_text_ends_before_the_first_stop_string(pieces, stops):
    """A stream shows what a whole answer would not, or keeps something back for good."""
    held, sent, text = HeldText(stops), Delta(), ""
    for piece in pieces:
        entry = TokenLogprobs(piece, 0.0, (), held.length)
        sent += held.add(piece, entry)
        text += piece
        if held.is_stopped:
            # what comes later may hold a longer stop string that begins earlier, and is no part of the answer
            break
    if not held.is_stopped:
        sent += held.rest()
    ends = [place for place in map(text.find, stops) if place >= 0]
    assert held.is_stopped == bool(ends)
    assert sent.text == text[: min(ends, default=len(text))]
    # every token that begins in the text, once, in order
    starts = [len("".join(pieces[:i])) for i in range(len(pieces))]
    expected = [start for start, piece in zip(starts, pieces, strict=True) if piece and start < min(ends, default=99)]
    assert [entry.offset for entry in sent.logprobs if entry.token] == expected


def test_text_is_let_go_as_soon_as_it_can_be():
    """A stream waits although no stop string can begin in what it has."""
    held = HeldText(["<end>"])
    assert [held.add(piece).text for piece in ("a", "<", "b", "<en", "<")] == ["a", "", "<b", "", "<en"]
