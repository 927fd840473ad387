"""Released DeepSpec drafters load, draft as the equations say, and survive a round trip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.modeling.deepspec_layout import (
    HIDDEN_SIZE,
    TARGET_LAYER_IDS,
    VOCAB_SIZE,
    Layout,
    all_layouts,
    deepspec_fields,
    write_deepspec,
)
from tests.modeling.drafting import draft_greedily
from tests.reference.drafter import DrafterOracle
from tests.tiny import tiny_target

# each head, confidence and backbone, in few of their combinations
QUICK = (
    *("qwen3-vanilla-none", "qwen3-gated-plain", "qwen3-rnn-markov", "qwen3-dflash-plain"),
    *("gemma4-gated-markov", "gemma4-k=v-vanilla-markov"),
)
LAYOUTS = [
    pytest.param(layout, id=layout.name, marks=[] if layout.name in QUICK else pytest.mark.slow)
    for layout in all_layouts()
]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def target() -> TargetAdapter:
    return TargetAdapter(tiny_target("qwen3", vocab_size=VOCAB_SIZE), TARGET_LAYER_IDS)


def _context(batch_size: int, length: int) -> torch.Tensor:
    return torch.randn(batch_size, length, len(TARGET_LAYER_IDS) * HIDDEN_SIZE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafts_equal_the_equations(layout: Layout, target: TargetAdapter, tmp_path: Path) -> None:
    """A released drafter would draft wrong tokens: a slot, position, norm, head or tensor name is off."""
    oracle = DrafterOracle(write_deepspec(tmp_path, layout), deepspec_fields(layout))
    drafter = DSparkAssistantModel.from_pretrained(tmp_path)
    lengths, anchors = [9, 5], [7, 31]
    context = _context(2, 9)
    block = draft_greedily(drafter, target, context, lengths, anchors)
    for row, (length, anchor) in enumerate(zip(lengths, anchors, strict=True)):
        expected = oracle.block(context[row, :length], list(range(length)), anchor, length)
        assert block.token_ids[row].tolist() == expected.token_ids
        torch.testing.assert_close(block.logits[row].double(), expected.logits, atol=TOLERANCE, rtol=0)
        if expected.confidence_logits is None:
            assert block.confidence is None
        else:
            confidence = expected.confidence_logits.sigmoid()
            torch.testing.assert_close(block.confidence[row].double(), confidence, atol=TOLERANCE, rtol=0)


def test_the_oracle_sees_what_the_tests_vary(target: TargetAdapter, tmp_path: Path) -> None:
    """The parity test would pass whatever the model does: its random drafters ignore context, anchor or position."""
    weights = write_deepspec(tmp_path, Layout())
    oracle = DrafterOracle(weights, deepspec_fields(Layout()))
    context = _context(1, 6)[0]
    block = oracle.block(context, list(range(6)), 7, 6)
    assert len(set(block.token_ids)) > 1
    for other in (
        oracle.block(context.flip(0), list(range(6)), 7, 6),
        oracle.block(context, list(range(6)), 8, 6),
        oracle.block(context, list(range(6)), 7, 7),
    ):
        assert (other.logits - block.logits).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_exact(layout: Layout, tmp_path: Path) -> None:
    """Saving a loaded drafter would lose, rename or round tensors."""
    layout = replace(layout, dtype=torch.bfloat16)
    weights = write_deepspec(tmp_path / "released", layout)
    drafter, info = DSparkAssistantModel.from_pretrained(tmp_path / "released", output_loading_info=True)
    assert not any(info.values())
    assert drafter.dtype == torch.bfloat16
    drafter.save_pretrained(tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    again, info = DSparkAssistantModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert again.dtype == torch.bfloat16
    assert again.config.to_json_string() == drafter.config.to_json_string()
    assert all(torch.equal(again.state_dict()[name], weights[name]) for name in weights)


def test_shapes_win_over_copied_fields(tmp_path: Path) -> None:
    """A released drafter whose copied fields describe its target would be built in the target's shape."""
    layout = Layout()
    write_deepspec(tmp_path, layout)
    fields = deepspec_fields(layout)
    fields |= {"num_hidden_layers": 36, "intermediate_size": 9728, "num_attention_heads": 32, "head_dim": 128}
    fields |= {"markov_rank": 256, "hidden_size": 2560, "vocab_size": 151936, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    DSparkAssistantModel.from_pretrained(tmp_path)


def test_overrides_reach_the_configuration(tmp_path: Path) -> None:
    """`from_pretrained(..., field=value)` would fail or be ignored for a released drafter."""
    write_deepspec(tmp_path, Layout())
    temperatures = [1.5] * 5
    drafter = DSparkAssistantModel.from_pretrained(tmp_path, sts_temperatures=temperatures)
    assert drafter.config.sts_temperatures == temperatures


@pytest.mark.parametrize(
    ("removed", "added"), [("layers.1.mlp.up_proj.weight", None), (None, "mask_embedding")], ids=["missing", "extra"]
)
def test_incomplete_weights_are_refused(removed: str | None, added: str | None, tmp_path: Path) -> None:
    """A drafter with random or ignored tensors would load with a warning and draft badly."""
    weights = write_deepspec(tmp_path, Layout())
    if removed is not None:
        del weights[removed]
    if added is not None:
        weights[added] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=removed or added):
        DSparkAssistantModel.from_pretrained(tmp_path)


def test_other_models_are_refused(tmp_path: Path) -> None:
    """A target's own folder given as the drafter's would be read as if it were one."""
    tiny_target("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a DSpark drafter, got .* with model type 'llama'"):
        DSparkAssistantModel.from_pretrained(tmp_path)


def test_fewer_drafts_leave_the_rest_alone(target: TargetAdapter, tmp_path: Path) -> None:
    """Capping the drafts would change them: the block must run at the width it was trained for."""
    write_deepspec(tmp_path, Layout(markov_head_type="rnn"))
    drafter = DSparkAssistantModel.from_pretrained(tmp_path)
    context = _context(1, 6)
    whole = draft_greedily(drafter, target, context, [6], [7])
    capped = draft_greedily(drafter, target, context, [6], [7], num_drafts=2)
    assert torch.equal(whole.token_ids[:, :2], capped.token_ids)
    torch.testing.assert_close(whole.logits[:, :2], capped.logits, atol=TOLERANCE, rtol=0)


def test_temperatures_divide_the_confidence(target: TargetAdapter, tmp_path: Path) -> None:
    """A calibrated drafter would report its raw confidence."""
    write_deepspec(tmp_path, Layout())
    temperatures = [0.5, 1.0, 2.0, 3.0, 4.0]
    context = _context(1, 6)
    raw = draft_greedily(DSparkAssistantModel.from_pretrained(tmp_path), target, context, [6], [7])
    calibrated = DSparkAssistantModel.from_pretrained(tmp_path, sts_temperatures=temperatures)
    block = draft_greedily(calibrated, target, context, [6], [7])
    expected = (raw.confidence.logit() / torch.tensor(temperatures)).sigmoid()
    torch.testing.assert_close(block.confidence, expected, atol=1e-5, rtol=0)
