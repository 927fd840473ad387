"""Prompts are processed in chunks of `prefill_chunk_size`, as without a drafter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.modeling.deepseek_v4.tiny import tiny_model
from tests.recurrent import RECURRENT_FAMILIES, available, recurrent_target
from tests.thinning import slow
from tests.tiny import tiny_target

CHUNK = 4
NEW_TOKENS = 10


def _target(family: str) -> PreTrainedModel:
    if family == "deepseek_v4":
        return tiny_model(5)
    return recurrent_target(family) if family in RECURRENT_FAMILIES else tiny_target(family)


def _widths(target: PreTrainedModel) -> list[int]:
    """Return a list to which every pass adds how many tokens a row has in it."""
    widths: list[int] = []
    target.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return widths


def _both(target: Any, num_rows: int, **options: Any) -> tuple[Any, Any]:
    inputs = ragged_prompts(num_rows, vocab_size=60)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "prefill_chunk_size": CHUNK, **options}
    script = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    plain = target.generate(**inputs, **options)
    drafter = ScriptedDrafter(target, script, num_padded(inputs), 0.7)
    return plain, target.generate(**inputs, **options, assistant_model=drafter)


CASES = [(family, num_rows) for family in ("llama", "gemma3_text", "gpt2") for num_rows in (1, 4)]
ALWAYS = [("deepseek_v4", 3), ("qwen3_5_text", 4)]


# one row and several, with and without sliding layers, with learned positions
QUICK = {("llama", 1), ("gemma3_text", 4), ("gpt2", 4)}


@pytest.mark.parametrize(
    ("family", "num_rows"), [*ALWAYS, *(case if case in QUICK else slow(*case) for case in CASES)]
)
def test_text_and_width(family, num_rows):
    """A long prompt takes the memory of one pass although chunks were asked for, or its text changes."""
    target = _target(family)
    widths = _widths(target)
    plain, assisted = _both(target, num_rows)
    assert torch.equal(assisted, plain)
    width = ragged_prompts(num_rows)["input_ids"].shape[1]
    # once for the drafter's script, without chunks
    assert widths.count(width) == 1
    assert widths.count(CHUNK) >= 2 * (width // CHUNK)


@pytest.mark.parametrize(("family", "num_rows"), [slow("gemma3_text", 1), ("gemma3_text", 4), slow("qwen3_5_text", 4)])
def test_outputs(family, num_rows):
    """Hidden states and logits of a prompt in chunks are of other tokens than without a drafter."""
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True}
    plain, assisted = _both(_target(family), num_rows, **wanted)
    assert torch.equal(assisted.sequences, plain.sequences)
    for ours, theirs in zip(assisted.hidden_states, plain.hidden_states, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one[0, -1], other[0, -1], atol=2e-4, rtol=1e-3)
    for one, other in zip(assisted.logits, plain.logits, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def test_embeddings():
    """A prompt of embeddings is silently processed in one pass."""
    target = tiny_target("llama")
    embeds = target.get_input_embeddings()(ragged_prompts(1)["input_ids"])
    drafter = ScriptedDrafter(target, torch.zeros(1, 40, dtype=torch.long), [0], 0.7)
    with pytest.raises(ValueError, match="`prefill_chunk_size` must be None for prompts other than text"):
        target.generate(inputs_embeds=embeds, max_new_tokens=4, prefill_chunk_size=CHUNK, assistant_model=drafter)


@pytest.mark.parametrize("family", available("mamba2"))
def test_states_alone(family):
    """Padding that is a chunk of its own gets into the states."""
    target, inputs = recurrent_target(family), ragged_prompts(3)
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = target.generate(**inputs, **options)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    for size in (1, CHUNK):
        # plain `generate` cannot ask such a cache for its length
        assert torch.equal(
            target.generate(**inputs, **options, prefill_chunk_size=size, assistant_model=drafter), plain
        )
