"""Tiny random DeepSeek-V4 models with all kinds of layers, and their settings for the oracle."""

from __future__ import annotations

from typing import Any

import torch

from dspark_hf import DeepseekV4DSparkConfig, DeepseekV4DSparkForCausalLM
from tests.reference.deepseek_v4 import Settings, Yarn

VOCAB = 96
YARN = {
    "type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}


def tiny_config(**fields: Any) -> DeepseekV4DSparkConfig:
    """Return a configuration: window, CSA (4), HCA (8), CSA, window; the first two layers route by token id."""
    defaults: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 5,
        "compress_ratios": [0, 4, 8, 4, 0],
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_hash_layers": 2,
        "sliding_window": 16,
        # the released 20 are a tenth of a pass
        "hc_sinkhorn_iters": 4,
        # few heads tie exactly: all of them cut to zero
        "index_n_heads": 32,
        "index_head_dim": 16,
        "index_topk": 8,
        "eos_token_id": None,
        "rope_scaling": YARN,
    }
    return DeepseekV4DSparkConfig(**{**defaults, **fields})


def tiny_model(seed: int = 0, **fields: Any) -> DeepseekV4DSparkForCausalLM:
    """Return a model whose every parameter is random, scaled so that its choices are far from even."""
    torch.manual_seed(seed)
    model = DeepseekV4DSparkForCausalLM(tiny_config(initializer_range=0.2, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def oracle_settings(config: DeepseekV4DSparkConfig) -> Settings:
    """Return the oracle's settings for a configuration."""
    scaling = config.compress_rope_scaling
    yarn = None
    if scaling:
        yarn = Yarn(
            factor=scaling["factor"],
            original_length=scaling["original_max_position_embeddings"],
            beta_fast=scaling["beta_fast"],
            beta_slow=scaling["beta_slow"],
        )
    return Settings(
        compress_ratios=tuple(config.compress_ratios[: config.num_hidden_layers]),
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        rope_head_dim=config.qk_rope_head_dim,
        o_groups=config.o_groups,
        num_experts_per_token=config.num_experts_per_tok,
        route_scale=config.routed_scaling_factor,
        window=config.sliding_window,
        layer_kinds=tuple(config.attention_kinds),
        index_num_heads=config.index_n_heads,
        index_head_dim=config.index_head_dim,
        index_topk=config.index_topk,
        index_fake_quant=config.indexer_dtype == "fp4",
        norm_topk_prob=config.norm_topk_prob,
        swiglu_limit=config.swiglu_limit,
        rms_eps=config.rms_norm_eps,
        hc_mult=config.hc_mult,
        hc_eps=config.hc_eps,
        hc_sinkhorn_iters=config.hc_sinkhorn_iters,
        rope_theta=config.rope_theta,
        compress_rope_theta=config.compress_rope_theta,
        yarn=yarn,
    )


def official_weights(model: DeepseekV4DSparkForCausalLM) -> dict[str, torch.Tensor]:
    """Return the weights under the released names."""
    return {name.removeprefix("model."): tensor.detach() for name, tensor in model.state_dict().items()}
