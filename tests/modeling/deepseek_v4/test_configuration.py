"""The configuration of DeepSeek-V4: kinds, finiteness and bounds, before anything is built."""

from __future__ import annotations

import json

import pytest

from dspark_hf import DeepseekV4DSparkConfig, DeepseekV4DSparkForCausalLM
from tests.modeling.deepseek_v4.tiny import YARN, tiny_config

WRONG = [
    ("vocab_size", None, "be an integer in"),
    ("num_hidden_layers", 10**9, r"be an integer in \[1, 1024\], got 1000000000"),
    ("num_hidden_layers", 2.5, "be an integer"),
    ("num_hidden_layers", True, "be an integer"),
    ("hidden_size", -32, "be an integer"),
    ("head_dim", "64", "be an integer in .* got '64'"),
    ("hc_sinkhorn_iters", 2**70, r"be an integer in \[1, 1000\]"),
    ("sliding_window", 10**9, "be an integer"),
    ("max_rollback", -1, r"be an integer in \[0, "),
    ("rms_norm_eps", float("nan"), "be a finite number"),
    ("rope_theta", 0, "be a finite number above 0"),
    ("swiglu_limit", float("inf"), "be a finite number above 0"),
    ("routed_scaling_factor", "1.5", "be a finite number"),
    ("use_cache", "yes", "be true or false"),
    ("compress_ratios", 4, "be a list of"),
    ("compress_ratios", [0, 4, 8, 4.0, 0], "be a list of"),
    ("compress_ratios", "04840", "be a list of"),
    ("dspark_block_size", 0, "be an integer"),
    ("dspark_noise_token_id", 96, r"lie in \[0, 95\], got 96"),
    ("dspark_target_layer_ids", [2, 2], r"be different layers in \[0, 4\]"),
    ("dspark_target_layer_ids", [2, 5], r"be different layers in \[0, 4\]"),
    ("dspark_target_layer_ids", 3, "be a list of"),
    ("dspark_markov_rank", -1, "be an integer"),
    ("rope_scaling", {"type": "linear", "factor": 2}, "be of the type 'yarn'"),
    ("rope_scaling", {"type": "yarn", "factor": 2}, "have a number above 0 as its 'original_max_position_embeddings'"),
    ("rope_scaling", {**YARN, "factor": float("nan")}, "have a number above 0 as its 'factor'"),
    ("rope_scaling", {**YARN, "beta_fast": "32"}, "have a number above 0 as its 'beta_fast'"),
    ("rope_scaling", "yarn", "be YaRN's parameters"),
]


@pytest.mark.parametrize(("name", "value", "rule"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_fields_are_refused_by_name(name, value, rule):
    """A field of another kind ends in an error of Python's, asks for terabytes, or fails in the first forward pass."""
    with pytest.raises(ValueError, match=f"`{name}` must {rule}"):
        tiny_config(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("hc_sinkhorn_iters", 10**6), ("rms_norm_eps", float("nan"))])
def test_fields_changed_while_loading_are_checked(checkpoints, name, value):
    """A wrong field gets in as an argument of `from_pretrained`."""
    with pytest.raises(ValueError, match=f"`{name}` must"):
        DeepseekV4DSparkForCausalLM.from_pretrained(checkpoints["bf16"], **{name: value})


def test_what_the_releases_hold_passes():
    """A released configuration is refused: numbers written as integers, YaRN without its optional parameters."""
    config = tiny_config(
        rope_theta=10000,
        rms_norm_eps=1e-20,
        rope_scaling={"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 64},
        num_nextn_predict_layers=None,
        dspark_target_layer_ids=(2, 3, 4),
    )
    again = DeepseekV4DSparkConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
