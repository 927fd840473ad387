"""Targets whose own mask knows no window: one token sees what the cache holds, several tokens would see more."""

from __future__ import annotations

import pytest
import torch
from transformers import MoshiConfig
from transformers.models.moshi.modeling_moshi import MoshiForCausalLM

from dspark_hf.generation.targets.masks import shows_past_windows
from tests.generation.drafters import ScriptedTreeDrafter
from tests.tiny import tiny_target

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def _target():
    config = MoshiConfig(vocab_size=64, ffn_dim=64, sliding_window=8, audio_vocab_size=8, **SIZES)
    model = MoshiForCausalLM(config).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


@pytest.mark.parametrize("prompt_length", [5, 12])
@pytest.mark.parametrize("draft_tree", ["off", 9])
def test_drafts_see_the_window_alone(draft_tree, prompt_length):
    """A pass over several drafts looks further back than one over a single token, and writes another text."""
    target, ids = _target(), torch.randint(1, 64, (1, prompt_length))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    plain = target.generate(ids, **options)
    drafter = ScriptedTreeDrafter(target, plain, [0], 0.8)
    drafter.scheduler = "fixed"
    assert torch.equal(target.generate(ids, **options, assistant_model=drafter, draft_tree=draft_tree), plain)
    assert drafter.last_statistics.num_accepted > 5


def test_where_no_mask_goes_the_call_is_refused():
    """Attentions of drafts that look too far back are given out."""
    target, ids = _target(), torch.randint(1, 64, (1, 5))
    drafter = ScriptedTreeDrafter(target, ids.repeat(1, 3), [0], 0.8)
    options = {"attention_mask": torch.ones_like(ids), "output_attentions": True, "return_dict_in_generate": True}
    target.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="must be left out for MoshiForCausalLM, whose windows only its cache knows"):
        target.generate(ids, **options, max_new_tokens=4, assistant_model=drafter)


def test_several_rows_are_refused():
    """Prompts of a batch are read through windows that plain `generate` does not give them."""
    target, ids = _target(), torch.randint(1, 64, (2, 12))
    drafter = ScriptedTreeDrafter(target, ids, [0, 0], 0.8)
    with pytest.raises(ValueError, match="whose windows only its cache knows, as MoshiForCausalLM's are"):
        target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, assistant_model=drafter)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "llama"])
def test_masks_that_know_their_windows_stay(family):
    """Targets that need no mask of ours, and several of their rows, are taken for ones that do."""
    assert not shows_past_windows(tiny_target(family))


def test_a_window_of_one_token_is_refused():
    """Caches for it keep every token, so passes over several tokens write another text."""
    target, ids = tiny_target("mistral", sliding_window=1), torch.randint(1, 64, (1, 5))
    with pytest.raises(ValueError, match="`sliding_window` of `target` must be at least 2, got 1"):
        target.generate(ids, max_new_tokens=4, assistant_model=ScriptedTreeDrafter(target, ids, [0], 0.8))
