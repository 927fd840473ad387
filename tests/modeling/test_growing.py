"""A drafter that grows drafts at first as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.growing import grow_drafter
from tests.closeness import assert_same_up_to_rounding
from tests.modeling.drafting import draft_greedily
from tests.tiny import tiny_target

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reduced, windows": {"draft_token_ids": range(10, 50), "context_window": 4},
    "some windows": {"context_window": 4, "sliding_layers": [0]},
    "biases": {"attention_bias": True},
    "norms behind": {"backbone_type": "gemma3"},
}


def _drafter(target: Any, **options: Any) -> DSparkAssistantModel:
    fields = {"num_hidden_layers": 1, "markov_rank": 8, "initializer_range": 0.3, "target_layer_ids": [1], **options}
    return DSparkAssistantModel.from_target(target, **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_stay(kind):
    """New layers and taps change drafts before they were trained, or are not there."""
    target = tiny_target("qwen3", num_hidden_layers=3)
    drafter = _drafter(target, **KINDS[kind])
    grown = grow_drafter(drafter, num_hidden_layers=3, target_layer_ids=[0, 1, 2])
    assert (len(grown.layers), grown.config.target_layer_ids) == (3, [0, 1, 2])
    assert len(drafter.layers) == 1
    context = torch.randn(1, 6, 3 * target.config.hidden_size)
    seen = context.chunk(3, dim=-1)[1]
    adapters = [TargetAdapter(target, one.target_layer_ids) for one in (drafter, grown)]
    before = draft_greedily(drafter, adapters[0], seen, [6], [12])
    after = draft_greedily(grown, adapters[1], context, [6], [12])
    assert torch.equal(after.token_ids, before.token_ids)
    proposable = before.logits.isfinite()
    assert_same_up_to_rounding(after.logits[proposable], before.logits[proposable])


@pytest.mark.parametrize("backbone", ["qwen3", "gemma3"])
def test_a_small_step_changes_drafts_little(backbone):
    """The first step of training, however small, adds as much to the states as a layer that was trained."""
    target = tiny_target("qwen3", num_hidden_layers=3)
    drafter = _drafter(target, backbone_type=backbone)
    grown = grow_drafter(drafter, num_hidden_layers=2)
    context = torch.randn(1, 6, target.config.hidden_size)
    adapter = TargetAdapter(target, drafter.target_layer_ids)
    before = draft_greedily(grown, adapter, context, [6], [12]).logits
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in grown.layers[1].parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    after = draft_greedily(grown, adapter, context, [6], [12]).logits
    # a layer's output is some hundredths of the states then, and was as large as they are
    assert 0 < (after - before).norm() / before.norm() < 0.05


def test_what_is_there_stays(tmp_path):
    """A drafter loses what it knows without a word, or the grown one cannot be saved."""
    target = tiny_target("qwen3", num_hidden_layers=3)
    drafter = _drafter(target, num_hidden_layers=2)
    assert grow_drafter(drafter, num_hidden_layers=2, target_layer_ids=[1]) is drafter
    with pytest.raises(ValueError, match=r"`num_hidden_layers` must be at least the 2 .*got 1"):
        grow_drafter(drafter, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"`target_layer_ids` must hold the layers \[1\] .*without \[1\]"):
        grow_drafter(drafter, target_layer_ids=[0, 2])
    grow_drafter(drafter, num_hidden_layers=3).save_pretrained(tmp_path)
    assert len(DSparkAssistantModel.from_pretrained(tmp_path).layers) == 3


def test_a_tap_behind_the_last_one():
    """A drafter that was not told how many layers its target has cannot read any behind those that it reads."""
    target = tiny_target("qwen3", num_hidden_layers=3)
    drafter = _drafter(target, num_target_layers=2)
    with pytest.raises(ValueError, match=r"`target_layer_ids` must lie in \[-1, 1\]"):
        grow_drafter(drafter, target_layer_ids=[1, 2])
    grown = grow_drafter(drafter, target_layer_ids=[1, 2], num_target_layers=3)
    assert (grown.config.target_layer_ids, grown.config.num_target_layers) == ([1, 2], 3)
    with pytest.raises(ValueError, match=r"`target_layer_ids` must lie in \[-1, 2\]"):
        grow_drafter(drafter, target_layer_ids=[1, 3], num_target_layers=3)
