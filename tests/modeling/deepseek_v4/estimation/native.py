"""Small configurations of Transformers' native models, as fields and as parameter counts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TINY_V4: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 120,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "q_lora_rank": 20,
    "o_groups": 2,
    "o_lora_rank": 12,
    "sliding_window": 16,
    "index_n_heads": 3,
    "index_head_dim": 16,
    "index_topk": 5,
    "moe_intermediate_size": 28,
    "n_routed_experts": 7,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "hc_mult": 3,
    "max_position_embeddings": 512,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
}

TINY_V32: dict[str, Any] = {
    "model_type": "deepseek_v32",
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 28,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "index_n_heads": 3,
    "index_head_dim": 16,
    "index_topk": 5,
    "max_position_embeddings": 512,
}


def native_config(fields: dict[str, Any]) -> Any:
    """Return Transformers' configuration of some fields."""
    others = {key: value for key, value in fields.items() if key != "model_type"}
    return AutoConfig.for_model(fields["model_type"], **others)


def num_native_parameters(fields: dict[str, Any]) -> int:
    """Return how many parameters Transformers' own model has; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(native_config(fields))
    return sum(parameter.numel() for parameter in model.parameters())
