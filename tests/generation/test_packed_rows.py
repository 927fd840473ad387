"""Rows of the target's head that a drafter borrows: packed beside the target, once, and of the head as it is now."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation import packing
from dspark_hf.generation.packing import can_pack, pack_beside, pack_weights, packed_weights
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target

pytestmark = [
    pytest.mark.skipif(not can_pack(), reason="no products with packed weights here"),
    pytest.mark.usefixtures("small_models_too"),
]

DRAFT_IDS = [3, 4, 9, 17, 30, 31, 62]


@pytest.fixture
def packed(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of weights, as they are packed."""
    seen: list[tuple[int, ...]] = []
    refresh = packing._PackedLayer.refresh

    def count(one, layer):
        before = one._packed
        refresh(one, layer)
        if one._packed is not before:
            seen.append(tuple(layer.weight.shape))

    monkeypatch.setattr(packing._PackedLayer, "refresh", count)
    return seen


def _pair(family: str = "llama") -> tuple[Any, DSparkAssistantModel]:
    target = tiny_target(family)
    options: dict[str, Any] = {"num_hidden_layers": 1, "block_size": 4, "markov_rank": 4}
    return target, DSparkAssistantModel.from_target(target, draft_token_ids=DRAFT_IDS, **options)


def _generate(target: Any, drafter: Any, **options: Any) -> list[list[int]]:
    inputs = ragged_prompts(2)
    options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0, "scheduler": "fixed", **options}
    if drafter is None:
        del options["scheduler"]
    return target.generate(**inputs, assistant_model=drafter, **options).tolist()


def _rows(drafter: DSparkAssistantModel, target: Any) -> nn.Linear:
    rows = drafter.draft_head(TargetAdapter(target)).rows
    assert rows is not None
    return rows


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_are_packed_once_for_all_calls(packed, family):
    """Rows are multiplied as they were copied, for four times as long, or are packed anew for each call."""
    target, drafter = _pair(family)
    plain = _generate(target, None)
    for _ in range(2):
        assert _generate(target, drafter) == plain
    assert packed.count((len(DRAFT_IDS), target.config.hidden_size)) == 1
    # between calls they multiply as ever
    assert "forward" not in vars(_rows(drafter, target))


def test_rows_are_those_of_the_head_as_it_is(packed):
    """Drafts come from a head of before its training: they are noise, and nobody notices but for the speed."""
    target, drafter = _pair()
    states = torch.randn(3, target.config.hidden_size)
    for num_packed in (1, 2):
        _generate(target, drafter)
        with torch.no_grad():
            expected = target.lm_head(states)[:, DRAFT_IDS]
            pack_weights(target)
            with packed_weights(target):
                found = drafter.draft_head(TargetAdapter(target))(states)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert packed.count((len(DRAFT_IDS), target.config.hidden_size)) == num_packed
        # as whoever merges an adapter does, which is not counted as a version
        target.lm_head.weight.data.mul_(-1)


def test_rows_of_inference_mode_are_not_kept_for_others():
    """Whoever differentiates through the head behind such a call is refused by autograd."""
    target, drafter = _pair()
    with torch.inference_mode():
        _generate(target, drafter)
    states = torch.randn(2, target.config.hidden_size, requires_grad=True)
    drafter.draft_head(TargetAdapter(target))(states).sum().backward()
    assert states.grad is not None


def test_rows_are_neither_copied_nor_packed_before_anything_is_drafted(packed, monkeypatch):
    """A text that is over before a draft pays for drafts."""
    target, drafter = _pair()
    copied: list[int] = []
    rows = TargetAdapter.head_rows
    monkeypatch.setattr(TargetAdapter, "head_rows", lambda *given: copied.append(1) or rows(*given))
    firsts = [row[-1] for row in _generate(target, None, max_new_tokens=1)]
    _generate(target, drafter, eos_token_id=firsts)
    assert packed and not copied and (len(DRAFT_IDS), target.config.hidden_size) not in packed
    _generate(target, drafter)
    assert len(copied) == 1


def test_rows_of_one_drafter_serve_targets_in_turn():
    """Rows of another target's head take part, or threads of one target count for the other."""
    (first, drafter), (second, _) = _pair(), _pair()
    with torch.no_grad():
        second.lm_head.weight.neg_()
    plain = [_generate(target, None) for target in (first, second)]
    for _ in range(2):
        assert [_generate(target, drafter) for target in (first, second)] == plain


def test_a_layer_beside_a_model_follows_it():
    """The layer multiplies packed outside of calls, or goes on after the model was forgotten."""
    model, layer = nn.Sequential(nn.Linear(24, 40)), nn.Linear(24, 8)
    pack_beside(model, layer)
    assert "forward" not in vars(layer)
    with torch.no_grad():
        states = torch.randn(2, 24)
        expected = layer(states)
        pack_weights(model)
        with packed_weights(model):
            pack_beside(model, layer)
            assert packing._PackedLayer.is_installed(layer)
            torch.testing.assert_close(layer(states), expected, rtol=0, atol=1e-5)
        assert "forward" not in vars(layer)
        with packed_weights(model):
            assert packing._PackedLayer.is_installed(layer)


def test_rows_go_with_their_drafter():
    """Every drafter that was ever used leaves the rows of a head behind."""
    target, drafter = _pair()
    _generate(target, drafter)
    rows = weakref.ref(_rows(drafter, target))
    assert rows() is not None
    del drafter
    gc.collect()
    assert rows() is None
