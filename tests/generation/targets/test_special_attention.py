"""Rows of targets whose layers see chunks of a text, or count columns, write what they write without a drafter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dspark_hf import DSparkAssistantModel, Request, generate_stream
from dspark_hf.generation.compat import CACHE_KEY, empty_cache_like
from dspark_hf.generation.scheduling.costs.workload import StepTimer
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.aligned_cache import AlignedCache
from dspark_hf.generation.targets.static_cache import StaticRaggedCache
from tests.closeness import assert_same_up_to_rounding
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.generation.targets.test_trees import _ragged
from tests.thinning import slow
from tests.tiny import SLIDING_WINDOW, SPECIAL_FAMILIES, tiny_target

NEW_TOKENS = 16
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
# some are shorter than a window or a chunk, others hold several
LENGTHS = (29, 3, 17, 9)
COUNTING = tuple(family for family in SPECIAL_FAMILIES if family != "llama4_text")
# one that counts by a bias, one by a window, and the one with chunks
QUICK = ("bloom", "gpt_neo", "llama4_text")
FAMILIES = [family if family in QUICK else slow(family) for family in SPECIAL_FAMILIES]


@pytest.mark.parametrize("attention", ["eager", slow("sdpa")])
@pytest.mark.parametrize("family", SPECIAL_FAMILIES)
def test_rows_write_what_plain_generate_writes(family: str, attention: str) -> None:
    """Windows, chunks or biases by distance fall on other tokens once rows accept different numbers of drafts."""
    target = tiny_target(family, attn_implementation="eager" if family in ("bloom", "mpt", "gpt_neo") else attention)
    inputs = ragged_prompts(4, lengths=LENGTHS)
    plain = target.generate(**inputs, **OPTIONS)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assert torch.equal(target.generate(**inputs, **OPTIONS, assistant_model=drafter), plain)
    assert drafter.last_statistics.num_accepted > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_end_early_leave(family: str) -> None:
    """A row that is over takes another one's columns with it."""
    target, inputs = tiny_target(family), ragged_prompts(4, lengths=LENGTHS)
    ends = target.generate(**inputs, **OPTIONS)[:, -NEW_TOKENS:][[1, 3], [2, 6]].tolist()
    plain = target.generate(**inputs, **OPTIONS, eos_token_id=ends)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assert torch.equal(target.generate(**inputs, **OPTIONS, eos_token_id=ends, assistant_model=drafter), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_that_come_and_go(family: str) -> None:
    """A request that joins a stream moves the columns of those that are in it."""
    target = tiny_target(family)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    prompts = [torch.randint(2, 60, (length,)) for length in LENGTHS]
    requests = [Request(one, {**OPTIONS, "max_new_tokens": 6 + 4 * i}, key=i) for i, one in enumerate(prompts)]
    for finished in generate_stream(target, requests, drafter=drafter, max_rows=2):
        i = finished.request.key
        alone = target.generate(prompts[i][None], **requests[i].options)[0]
        assert finished.error is None and torch.equal(finished.token_ids, alone)


@pytest.mark.parametrize("family", [family if family in QUICK else slow(family) for family in COUNTING])
@torch.no_grad()
def test_the_state_is_that_of_a_fresh_prefill(family: str) -> None:
    """A row whose drafts were refused keeps a key of one of them, or loses one of its own."""
    model, inputs = tiny_target(family), ragged_prompts(4, lengths=LENGTHS)
    with TargetAdapter(model, [0]) as adapter:
        target = _ragged(adapter, inputs)
        assert isinstance(target.cache, AlignedCache)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        texts = [row[seen.bool()] for row, seen in zip(ids, mask, strict=True)]
        for counts in ([5, 1, 2, 0], [2, 2, 2, 2], [0, 3, 1, 4]):
            tokens = torch.randint(2, 60, (4, 5))
            target.verify(tokens)
            target.keep([range(count) for count in counts])
            texts = [torch.cat([text, row[:n]]) for text, row, n in zip(texts, tokens, counts, strict=True)]
        # the longest row gets no more than it has: padding that all rows have is gone
        target.select_rows(torch.tensor([2, 0]))
        for row, text in enumerate([texts[2], texts[0]]):
            fresh = model(text[None], use_cache=True)[CACHE_KEY]
            for layer, expected in zip(target.cache.layers, fresh.layers, strict=True):
                for own, other in ((layer.keys, expected.keys), (layer.values, expected.values)):
                    assert_same_up_to_rounding(own[row, :, -len(text) :], other[0])


@pytest.mark.parametrize("family", COUNTING)
def test_a_static_cache_is_refused_before_any_work(family: str) -> None:
    """A static cache, whose rows do not move, of a target that counts columns changes the text."""
    target = tiny_target(family)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    kwargs = {CACHE_KEY: empty_cache_like(target)}
    with pytest.raises(ValueError, match=r"unless the target has full, sliding or chunked .*\['(local|alibi)'\]"):
        StaticRaggedCache(target, 2, kwargs[CACHE_KEY], num_slots=64, sees_all=False)
    if family in ("mpt", "gpt_neo"):
        with pytest.raises(ValueError, match="A static cache is served as several rows are"):
            target.generate(**ragged_prompts(2), **OPTIONS, cache_implementation="static", assistant_model=drafter)


def test_chunks_in_a_static_cache() -> None:
    """Chunks of a static cache begin elsewhere."""
    target, inputs = tiny_target("llama4_text"), ragged_prompts(3, lengths=LENGTHS)
    options = {**OPTIONS, "cache_implementation": "static", "disable_compile": True}
    try:
        plain = target.generate(**inputs, **options)
    except TypeError as error:
        # transformers 5.17: its masks for a static cache are made with an argument that those of chunks do not know
        pytest.skip(f"plain `generate` fails itself: {error}")
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), plain)


def test_attention_that_is_scaled_by_length() -> None:
    """Layers that scale attention by how much the cache holds scale a short row by the longest one's length."""
    target = tiny_target("llama4_text", floor_scale=44, attn_scale=4.0)
    inputs = ragged_prompts(2, lengths=(9, 3))
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=5)
    plain = target.generate(**inputs, **OPTIONS)
    assert torch.equal(target.generate(**inputs, **OPTIONS, assistant_model=drafter), plain)
    with pytest.raises(ValueError, match=r"`max_new_tokens` must keep text and drafts below 44 tokens .*got up to "):
        target.generate(**inputs, **{**OPTIONS, "max_new_tokens": 40}, assistant_model=drafter)
    alone = {name: values[:1] for name, values in inputs.items()}
    plain = target.generate(**alone, **{**OPTIONS, "max_new_tokens": 40})
    assert torch.equal(target.generate(**alone, **{**OPTIONS, "max_new_tokens": 40}, assistant_model=drafter), plain)


def test_costs_of_rows_that_count_columns() -> None:
    """What passes of several rows cost cannot be measured of targets that are served."""
    target = tiny_target("bloom")
    with torch.no_grad(), TargetAdapter(target, [0]) as adapter:
        assert StepTimer(adapter, None).verify_seconds(3, 4 * SLIDING_WINDOW, 4) > 0
