"""The parts of the server that need none: text that is held back, and what fields do to logits."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_hf import Request, generate_stream
from dspark_hf.generation.lookup_assistant import LookupAssistant
from dspark_hf.serving.held_text import Delta, HeldText, TokenLogprobs
from dspark_hf.serving.processors import SeededNoise
from tests.reference.sampling import SMALLEST_P_VALUE, p_value
from tests.tiny import tiny_target

_few = st.text("ab", min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(_few, max_size=3))
def test_text_ends_before_the_first_stop_string(pieces, stops):
    """A stream shows what a whole answer would not, or keeps something back for good."""
    held, sent = HeldText(stops), Delta()
    for piece in pieces:
        entry = TokenLogprobs(piece, 0.0, (), held.length)
        sent += held.add(piece, entry)
        if held.is_stopped:
            break
    if not held.is_stopped:
        sent += held.rest()
    text = "".join(pieces)
    ends = [place for place in map(text.find, stops) if place >= 0]
    assert held.is_stopped == bool(ends)
    assert sent.text == text[: min(ends, default=len(text))]
    # every token that begins in the text, once, in order
    starts = [len("".join(pieces[:i])) for i in range(len(pieces))]
    expected = [start for start in starts if not ends or start < min(ends)]
    assert [entry.offset for entry in sent.logprobs] == expected


def test_text_is_let_go_as_soon_as_it_can_be():
    """A stream waits although no stop string can begin in what it has."""
    held = HeldText(["<end>"])
    assert [held.add(piece).text for piece in ("a", "<", "b", "<en", "<")] == ["a", "", "<b", "", "<en"]


def test_seeds_draw_from_the_distribution():
    """Requests with a seed are sampled from another distribution than the target's, or their tokens hang together."""
    scores = torch.randn(1, 7, generator=torch.Generator().manual_seed(1)) * 2
    ids, lengths = torch.zeros(1, 4, dtype=torch.long), (3, 4)
    draws = [[int(SeededNoise(seed)(ids[:, :n], scores).argmax()) for n in lengths] for seed in range(4000)]
    probs = torch.softmax(scores[0], -1)
    assert p_value(torch.tensor(draws), torch.outer(probs, probs)) > SMALLEST_P_VALUE


def test_noise_is_drawn_for_drafts_too():
    """With a seed drafts are drawn without its noise, and hardly any is accepted."""
    target = tiny_target(initializer_range=0.02)
    target.generation_config.eos_token_id = None
    noise = {"logits_processor": [SeededNoise(3)], "do_sample": False, "max_new_tokens": 30}
    plain = target.generate(torch.tensor([[5, 6, 7]]), **noise)
    (finished,) = generate_stream(target, [Request([5, 6, 7], noise)], drafter=LookupAssistant())
    assert finished.token_ids is not None and torch.equal(finished.token_ids, plain[0])
