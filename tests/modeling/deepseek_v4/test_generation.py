"""DeepSeek-V4 in `generate`: every mode, and a drafter that changes nothing."""

from __future__ import annotations

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.compat import CACHE_KEY
from tests.modeling.deepseek_v4.tiny import VOCAB, tiny_model
from tests.thinning import slow

PAD = 0


def _prompts(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    token_ids = torch.randint(1, VOCAB, (num_rows, 17))
    mask = torch.ones_like(token_ids)
    for row in range(1, num_rows):
        mask[row, : 4 * row] = 0
    return token_ids, mask


def _generate(model, token_ids, mask, **options):
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": PAD, **options}
    return model.generate(token_ids, attention_mask=mask, **settings)


def _check_greedy(seed: int, num_rows: int, num_tokens: int, **fields: str) -> None:
    """Check that a drafter changes no token."""
    model = tiny_model(seed, **fields)
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=8, block_size=6)
    prompts = _prompts(num_rows)
    plain = _generate(model, *prompts, max_new_tokens=num_tokens)
    assert torch.equal(plain, _generate(model, *prompts, max_new_tokens=num_tokens, assistant_model=drafter))
    # the drafts were random: hardly any was accepted, so nearly every round rolled back
    assert drafter.last_statistics.num_target_passes > 0.75 * num_tokens


@pytest.mark.parametrize("num_rows", [slow(1), 4])
@pytest.mark.parametrize("seed", [0, slow(1)])
def test_a_drafter_changes_no_token(seed, num_rows):
    """Greedy text with a drafter is not the text without one."""
    _check_greedy(seed, num_rows, 18)


@pytest.mark.parametrize(("cache_dtype", "num_rows"), [("fp8", 4), slow(None, 1), slow("fp8", 1), slow(None, 4)])
def test_a_drafter_changes_no_token_with_rounded_keys(num_rows, cache_dtype):
    """Keys that are rounded in the cache make a verify pass see other entries than plain decoding."""
    _check_greedy(
        3, num_rows, 10, indexer_dtype="fp4", **({} if cache_dtype is None else {"cache_dtype": cache_dtype})
    )


def test_rows_that_end_early():
    """A row that ends while others go on disturbs them, or is filled with something else than padding."""
    model = tiny_model(3)
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=8)
    token_ids, mask = _prompts(4)
    free = _generate(model, token_ids, mask, max_new_tokens=18)
    # end tokens that occur at different places
    ends = sorted({int(free[row, 17 + 4 * (row + 1)]) for row in range(4)})
    plain = _generate(model, token_ids, mask, max_new_tokens=18, eos_token_id=ends)
    assisted = _generate(model, token_ids, mask, max_new_tokens=18, eos_token_id=ends, assistant_model=drafter)
    assert torch.equal(plain, assisted)


def test_other_modes():
    """Prompt lookup, beams, sampling or no cache fail, or give other text."""
    model = tiny_model(4)
    token_ids, mask = _prompts(2)
    single = token_ids[:1], mask[:1]
    # past the window, and past the end of a compressed group; without a cache every step takes as long as the text
    plain = _generate(model, *single, max_new_tokens=12)
    assert torch.equal(_generate(model, *single, max_new_tokens=12, prompt_lookup_num_tokens=5), plain)
    assert torch.equal(_generate(model, *single, max_new_tokens=12, use_cache=False), plain)
    beams = _generate(model, token_ids, mask, num_beams=3, max_new_tokens=6)
    assert torch.equal(beams, _generate(model, token_ids, mask, num_beams=3, max_new_tokens=6, use_cache=False))
    sampled = _generate(model, token_ids, mask, do_sample=True, num_return_sequences=2, max_new_tokens=4)
    assert sampled.shape[0] == 4
    with pytest.raises(ValueError, match="`cache_implementation` must be left out"):
        _generate(model, token_ids, mask, cache_implementation="static")


@pytest.mark.parametrize("is_assisted", [slow(False), True])
def test_conversation_goes_on_from_a_returned_cache(is_assisted):
    """A second turn on the first turn's cache differs from one that starts anew."""
    model = tiny_model(5)
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=8)
    token_ids, mask = _prompts(3)
    options = {"assistant_model": drafter} if is_assisted else {}
    first = _generate(model, token_ids, mask, max_new_tokens=10, return_dict_in_generate=True, **options)
    more = torch.randint(1, VOCAB, (3, 5))
    whole = torch.cat([first.sequences, more], dim=1)
    whole_mask = torch.cat([mask, mask.new_ones(3, whole.shape[1] - mask.shape[1])], dim=1)
    expected = _generate(model, whole, whole_mask, max_new_tokens=10)
    cached = {CACHE_KEY: first[CACHE_KEY], "max_new_tokens": 10}
    assert torch.equal(_generate(model, whole, whole_mask, **cached, **options), expected)


def test_sampling_with_a_drafter_follows_the_target():
    """Sampled text with a drafter has another distribution than without."""
    model = tiny_model(6)
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=8, block_size=3)
    torch.manual_seed(0)
    num_draws = 400
    token_ids = torch.tensor([[5, 9, 12]]).expand(num_draws, -1)
    options = {"do_sample": True, "max_new_tokens": 3, "top_k": 4, "temperature": 1.5}
    counts = []
    for extra in ({}, {"assistant_model": drafter, "scheduler": "fixed", "drafts": "model"}):
        sampled = _generate(model, token_ids, torch.ones_like(token_ids), **options, **extra)[:, 3:]
        counts.append(torch.stack([torch.bincount(column, minlength=VOCAB) for column in sampled.T]) / num_draws)
    # both are samples: five standard deviations of their difference
    deviation = (counts[0] * (1 - counts[0]) * 2 / num_draws).sqrt()
    assert ((counts[0] - counts[1]).abs() <= 5 * deviation + 3 / num_draws).all()
    assert drafter.last_statistics is not None and drafter.last_statistics.num_verified > 0


def test_a_cache_too_short_for_the_drafts_is_refused_first():
    """The error comes after tokens were generated, or never."""
    model = tiny_model(7, max_rollback=4)
    drafter = DSparkAssistantModel.from_target(model, num_hidden_layers=1, markov_rank=8, block_size=7)
    with pytest.raises(ValueError, match="`max_rollback` must be at least 8"):
        _generate(model, *_prompts(1), assistant_model=drafter)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("seed", range(8))
def test_a_drafter_changes_no_token_in_long_texts(seed, num_rows):
    """Greedy text of 200 tokens with a drafter is not the text without one."""
    _check_greedy(seed, num_rows, 200)
