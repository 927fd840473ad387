"""A drafter whose numbers are broken costs time, and neither ends a call nor changes what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dspark_hf import DSparkAssistantModel, Request, generate_stream
from tests.generation.frequencies import PROMPT, small_target, smallest_p_value, untrained_drafter
from tests.generation.prompts import ragged_prompts
from tests.reference.sampling import SMALLEST_P_VALUE, text_probabilities
from tests.thinning import slow
from tests.tiny import tiny_target

NEW_TOKENS = 12
INFINITE, NO_NUMBER = float("inf"), float("nan")


def _broken(target: Any, value: float, place: str = "markov_head.markov_w2.weight") -> DSparkAssistantModel:
    """Return a drafter with one weight of `value`."""
    drafter = untrained_drafter(target)
    with torch.no_grad():
        drafter.get_parameter(place).view(-1)[0] = value
    return drafter


@pytest.mark.parametrize(
    ("scheduler", "value"),
    [
        ("adaptive", NO_NUMBER),
        slow("fixed", INFINITE),
        ("threshold", -INFINITE),
        slow("adaptive", INFINITE),
        slow("adaptive", -INFINITE),
        slow("fixed", -INFINITE),
        slow("fixed", NO_NUMBER),
        slow("threshold", INFINITE),
        slow("threshold", NO_NUMBER),
    ],
)
def test_sampling_goes_on(scheduler, value):
    """A drafter with one infinite weight ends a sampled call with words about a probability tensor."""
    target = tiny_target()
    for place in ("markov_head.markov_w2.weight", "norm.weight", "confidence_head.proj.weight"):
        drafter = _broken(target, value, place)
        inputs = ragged_prompts(2)
        options = {"max_new_tokens": NEW_TOKENS, "assistant_model": drafter, "scheduler": scheduler}
        ids = target.generate(**inputs, do_sample=True, **options)
        assert ids.shape[1] == inputs["input_ids"].shape[1] + NEW_TOKENS


def test_greedy_text():
    """A drafter with a weight that is no number changes greedy text."""
    target, inputs = tiny_target(), ragged_prompts(2)
    plain = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    assert torch.equal(target.generate(**inputs, **options, assistant_model=_broken(target, NO_NUMBER)), plain)


@pytest.mark.parametrize("value", [slow(INFINITE), NO_NUMBER])
def test_the_law_is_kept(value):
    """What is drafted in place of a broken distribution is accepted more often than its law allows."""
    target = small_target()
    drafter = _broken(target, value)
    options = {"max_new_tokens": 5, "do_sample": True, "assistant_model": drafter}
    samples = target.generate(PROMPT.expand(600, -1), **options)[:, len(PROMPT) :]
    assert drafter.last_statistics.num_verified
    assert smallest_p_value(samples, text_probabilities(target, PROMPT, 5)) > SMALLEST_P_VALUE


def test_stream():
    """A broken drafter ends requests that sample."""
    target = tiny_target()
    requests = [Request([3, 4, 5], {"max_new_tokens": NEW_TOKENS, "do_sample": bool(i % 2)}) for i in range(3)]
    for finished in generate_stream(target, requests, drafter=_broken(target, INFINITE)):
        assert finished.error is None


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_broken_target_goes_on_failing(num_rows):
    """A target that gives no distribution is covered up, and its text goes on with some token."""
    target = tiny_target()
    drafter = untrained_drafter(target)
    with torch.no_grad():
        target.lm_head.weight[0, 0] = NO_NUMBER
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": True}
    for extra in ({}, {"assistant_model": drafter}, {"assistant_model": drafter, "sampling": "invariant"}):
        with pytest.raises(RuntimeError, match="probability tensor contains"):
            target.generate(**ragged_prompts(num_rows), **options, **extra)
