"""Positions and token types: those that the user gives, and the last position that a target knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, StoppingCriteria, StoppingCriteriaList

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.requests.request import Request
from dspark_hf.generation.requests.stream import generate_stream
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.thinning import slow
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_target

NUM_POSITIONS = 32


class EndsAt(StoppingCriteria):
    """End every text at `length` tokens."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def _untrained(target):
    return DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=5)


@pytest.mark.parametrize(
    ("length", "num_rows"),
    [(NUM_POSITIONS, 3), (NUM_POSITIONS + 1, 1), slow(NUM_POSITIONS, 1), slow(NUM_POSITIONS + 1, 3)]
    + [slow(NUM_POSITIONS - 3, num_rows) for num_rows in (1, 3)],
)
def test_texts_that_end_before_learned_positions_do(length, num_rows):
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


def _positions(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def test_position_ids_that_the_mask_implies():
    """Positions that say nothing new are refused."""
    target = tiny_target("llama")
    inputs = ragged_prompts(4)
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    # what stands at padding is nobody's
    for positions in (_positions(inputs), _positions(inputs) + 5 * (1 - inputs["attention_mask"])):
        drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
        options = {"max_new_tokens": 12, "do_sample": False, "position_ids": positions}
        assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), plain)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 2)], ids=["batch", "padded"])
def test_position_ids_of_ones_own(rows):
    """Positions of the user's are silently replaced by others."""
    target = tiny_target("llama")
    inputs = {name: tensor[rows] for name, tensor in ragged_prompts(3).items()}
    for positions in (2 * _positions(inputs), _positions(inputs) + 1):
        with pytest.raises(ValueError, match="`position_ids` must count the tokens that `attention_mask` leaves"):
            target.generate(**inputs, position_ids=positions, max_new_tokens=4, assistant_model=_untrained(target))


@pytest.mark.parametrize("num_rows", [1, 4])
def test_token_types(num_rows):
    """Token types, which GPT-2 adds to its embeddings, are left out or go to other tokens."""
    target = tiny_target("gpt2")
    inputs = ragged_prompts(num_rows)
    inputs["token_type_ids"] = torch.randint(2, VOCAB_SIZE, inputs["input_ids"].shape)
    # rows leave at different times
    texts = target.generate(**inputs, max_new_tokens=24, do_sample=False)
    ends = sorted({int(texts[row, -20 + 6 * row]) for row in range(num_rows)})
    for options in ({}, {"eos_token_id": ends, "pad_token_id": 0}):
        plain = target.generate(**inputs, max_new_tokens=24, do_sample=False, **options)
        drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
        options["assistant_model"] = drafter
        assert torch.equal(target.generate(**inputs, max_new_tokens=24, do_sample=False, **options), plain)


def test_token_types_of_images():
    """Types that tell text from images are refused where all is text, or passed over where some is not."""
    target = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(
            "gemma3",
            text_config=tiny_config("gemma3_text").to_dict(),
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
            mm_tokens_per_image=1,
        )
    ).eval()
    inputs = ragged_prompts(3)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**inputs, **options)
    types = torch.zeros_like(inputs["input_ids"])
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    texts = target.generate(**inputs, **options, token_type_ids=types, assistant_model=drafter)
    assert torch.equal(texts, plain)
    types[:, -2] = 1
    with pytest.raises(ValueError, match="`token_type_ids` must be 0, those of text"):
        target.generate(**inputs, **options, token_type_ids=types, assistant_model=drafter)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_requests_with_positions_or_types(name):
    """What a request says of its tokens beside their ids is silently passed over."""
    target = tiny_target("gpt2")
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    requests = [
        Request([5, 6, 7], {**options, name: torch.tensor([[0, 2, 4]])}, "bad"),
        Request([5, 6, 7], options, "good"),
    ]
    finished = {one.request.key: one for one in generate_stream(target, requests, drafter=_untrained(target))}
    assert f"`{name}` must" in str(finished["bad"].error)
    assert torch.equal(finished["good"].token_ids, target.generate(torch.tensor([[5, 6, 7]]), **options)[0])


@pytest.mark.parametrize("lengths", [(6,), slow((6, 9)), (40, 6), slow((40, 35))])
def test_texts_that_outgrow_rotary_positions(lengths):
    """Text past `max_position_embeddings`, where rotary embeddings go on, is written as if it all stood there."""
    target = tiny_target("llama", max_position_embeddings=NUM_POSITIONS)
    inputs = ragged_prompts(len(lengths), lengths=lengths)
    plain = target.generate(**inputs, max_new_tokens=50, do_sample=False)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assisted = target.generate(**inputs, max_new_tokens=50, do_sample=False, assistant_model=drafter)
    assert torch.equal(assisted, plain)
    assert drafter.last_statistics.num_accepted > 0
