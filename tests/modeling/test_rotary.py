"""A drafter rotates as its configuration names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dspark_hf import DSparkAssistantModel, DSparkConfig
from dspark_hf.modeling.rotary import RotaryEmbedding, rotate
from tests.reference.drafter import rotate as rotate_slowly
from tests.tiny import tiny_target

_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


def _config(**fields: Any) -> DSparkConfig:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "target_layer_ids": [0]}
    return DSparkConfig(**sizes, max_position_embeddings=256, **fields)


@pytest.mark.parametrize("parameters", [_YARN, _LLAMA3, _LINEAR], ids=lambda parameters: parameters["rope_type"])
def test_scaled_rotations_are_those_of_transformers(parameters: dict[str, Any]) -> None:
    """A drafter trained with a scaled rotation would turn keys otherwise: acceptance falls without a word."""
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=dict(parameters)
        )
    )
    positions = torch.tensor([[0, 1, 5, 63, 64, 200]])
    expected = theirs(torch.zeros(1, dtype=torch.float32), positions)
    # loading makes modules on the meta device
    with torch.device("meta"):
        ours = RotaryEmbedding(_config(rope_parameters=dict(parameters)))
    for mine, other in zip(ours(positions, torch.float32), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)
    plain = RotaryEmbedding(_config(rope_parameters={"rope_type": "default", "rope_theta": parameters["rope_theta"]}))
    assert (plain(positions, torch.float32)[0] - expected[0]).abs().max() > 0.1


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_rotation_equals_the_equations(is_interleaved: bool, share: float) -> None:
    """Entries would turn with the wrong partners, or those beyond a partial rotation would turn as well."""
    rotary = RotaryEmbedding(_config(rope_parameters={"rope_theta": 100.0, "partial_rotary_factor": share}))
    states, positions = torch.randn(1, 5, 2, 16), torch.tensor([[0, 1, 2, 9, 30]])
    turned = rotate(states, rotary(positions, torch.float32), is_interleaved)
    size = int(16 * share)
    for token, position in enumerate(positions[0].tolist()):
        for head in range(2):
            expected = states[0, token, head].double().clone()
            expected[:size] = rotate_slowly(expected[:size], position, 100.0, 1.0, is_interleaved)
            torch.testing.assert_close(turned[0, token, head].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("parameters", [_YARN, _LLAMA3, _LINEAR], ids=lambda parameters: parameters["rope_type"])
def test_a_fresh_drafter_keeps_its_targets_scaling(parameters: dict[str, Any]) -> None:
    """A drafter for a long-context target would rotate at another rate than the states that it reads."""
    target = tiny_target("llama", rope_parameters=dict(parameters))
    kept = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4).config.rope_parameters
    assert {name: kept[name] for name in parameters} == parameters


@pytest.mark.parametrize(
    ("parameters", "rule"),
    [
        ({"rope_type": "longrope"}, "have a `rope_type` of"),
        ({"rope_type": "yarn", "factor": 2.0}, "have a finite `original_max_position_embeddings` above 0"),
        ({"rope_type": "linear", "factor": float("nan")}, "have a finite `factor` above 0"),
        ({"rope_theta": -1.0}, "have a finite `rope_theta` above 0"),
        ({"partial_rotary_factor": 1.5}, "have a `partial_rotary_factor` of at most 1"),
    ],
)
def test_other_rotations_are_refused(parameters: dict[str, Any], rule: str) -> None:
    """A rotation that is not known would be taken for the default one."""
    with pytest.raises(ValueError, match=f"`rope_parameters` must {rule}"):
        _config(rope_parameters=parameters)
