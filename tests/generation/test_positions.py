"""Positions near the last one that a target knows, or was trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.request_queue import Request
from dspark_hf.generation.request_stream import generate_stream
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.tiny import tiny_target

NUM_POSITIONS = 32


class EndsAt(StoppingCriteria):
    """End every text at `length` tokens."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def _untrained(target):
    return DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=5)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("length", [NUM_POSITIONS - 3, NUM_POSITIONS, NUM_POSITIONS + 1])
def test_texts_that_end_before_learned_positions_do(num_rows, length):
    """Drafts of a text that ends in time run past the last position, and the call breaks off."""
    target = tiny_target("gpt2", max_position_embeddings=NUM_POSITIONS)
    inputs = ragged_prompts(num_rows, lengths=(7, 11, 4))
    options: dict[str, Any] = {
        "max_new_tokens": 100,
        "do_sample": False,
        "stopping_criteria": StoppingCriteriaList([EndsAt(length)]),
    }
    plain = target.generate(**inputs, **options)
    for accuracy in (0.0, 1.0):
        drafter = ScriptedDrafter(target, plain, num_padded(inputs), accuracy)
        assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), plain)


def test_requests_that_end_before_learned_positions_do():
    """Drafts of one request run past the last position and end the whole stream."""
    target = tiny_target("gpt2", max_position_embeddings=NUM_POSITIONS)
    requests = [
        Request(
            torch.arange(2, 2 + size),
            {
                "max_new_tokens": 100,
                "do_sample": False,
                "stopping_criteria": StoppingCriteriaList([EndsAt(NUM_POSITIONS + 1)]),
            },
        )
        for size in (4, 9, 20)
    ]
    for one in generate_stream(target, requests, drafter=_untrained(target), scheduler="fixed"):
        assert one.error is None
        assert torch.equal(one.token_ids, target.generate(one.request.input_ids[None], **one.request.options)[0])


@pytest.mark.parametrize("lengths", [(6,), (6, 9), (40, 6), (40, 35)])
def test_texts_that_outgrow_rotary_positions(lengths):
    """Text past `max_position_embeddings`, where rotary embeddings go on, is written as if it all stood there."""
    target = tiny_target("llama", max_position_embeddings=NUM_POSITIONS)
    inputs = ragged_prompts(len(lengths), lengths=lengths)
    plain = target.generate(**inputs, max_new_tokens=50, do_sample=False)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assisted = target.generate(**inputs, max_new_tokens=50, do_sample=False, assistant_model=drafter)
    assert torch.equal(assisted, plain)
    assert drafter.last_statistics.num_accepted > 0
