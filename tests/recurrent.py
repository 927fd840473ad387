"""Tiny random targets of all families with recurrent layers: seconds to build."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from dspark_hf.generation.compat import CACHE_KEY
from tests.tiny import SLIDING_WINDOW, tiny_config, tiny_target

_TYPES = {"layer_types": ["linear_attention", "linear_attention", "full_attention"], "num_hidden_layers": 3}
_GATED_DELTA = {
    **_TYPES,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _GATED_DELTA,
    "qwen3_5_moe_text": {**_GATED_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_next": {**_GATED_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 24},
    "olmo_hybrid": _GATED_DELTA,
    "lara_mini": {
        **_GATED_DELTA,
        **_EXPERTS,
        "shared_expert_intermediate_size": 24,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["linear_attention", "linear_attention", "sliding_attention"],
    },
    # three states a layer: one of the delta rule, one of an embedding's convolution, and the last token ids
    "qwen4_exp_text": {
        **_GATED_DELTA,
        **_EXPERTS,
        "shared_expert_intermediate_size": 24,
        "hc_lowrank": 8,
        "ple_layer_ids": [1, 2],
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "heads_per_ngram": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
        # without one its embeddings cannot be made
        "eos_token_id": 63,
    },
    "kimi_linear": {**_TYPES, **_LATENT, **_EXPERTS, "linear_head_dim": 8, "linear_num_heads": 4},
    "bailing_hybrid": {**_TYPES, **_LATENT, **_EXPERTS, "n_group": 1, "topk_group": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1], "num_hidden_layers": 3},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_TYPES,
        **_MAMBA2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 16,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1],
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
    },
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "jamba": {
        "num_hidden_layers": 3,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "zamba": {
        "num_hidden_layers": 3,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
    },
    "lfm3": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "sliding_attention", "conv"],
        "sliding_window": SLIDING_WINDOW,
    },
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
}


# before transformers 5.24, a model of states alone took its cache by another name
_SINCE_5_24 = ("mamba", "mamba2", "falcon_mamba")
RECURRENT_FAMILIES = {
    family: fields
    for family, fields in _FAMILIES.items()
    if family in CONFIG_MAPPING and (CACHE_KEY == "cache" or family not in _SINCE_5_24)
}


def available(*families: str) -> tuple[str, ...]:
    """Return those of `families` that can be served with this version of Transformers."""
    return tuple(family for family in families if family in RECURRENT_FAMILIES)


def recurrent_target(family: str, **overrides: Any) -> PreTrainedModel:
    """Return a small random causal LM of `family`, fp32, in evaluation mode."""
    return tiny_target(family, **{**RECURRENT_FAMILIES[family], **overrides})


def tiny_glm5_next() -> PreTrainedModel:
    """Return a small random GLM-5-Next, which has no class for its text alone."""
    text = {
        **_EXPERTS,
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "v_head_dim": 8,
        "qk_nope_head_dim": 8,
        "n_routed_experts": 4,
        # so many that all are chosen: scores of 0 tie, and a tie falls as the pass is wide
        "index_topk": 64,
        "index_kpool": 2,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "hc_mult": 2,
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "image_size": 28, "out_hidden_size": 32}
    fields = tiny_config("qwen3").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "initializer_range")
    common = {name: fields[name] for name in names}
    config = AutoConfig.for_model(
        "glm5_next",
        text_config={**common, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 256, **text},
        vision_config={**vision, "intermediate_size": 16, "projection_intermediate_size": 16},
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
