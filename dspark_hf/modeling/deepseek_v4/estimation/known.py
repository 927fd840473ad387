"""The configurations of the released models, as far as sizes go, so that they need no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}

_V4: Mapping[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "num_hash_layers": 3,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "hc_mult": 4,
    "max_position_embeddings": 1048576,
    "tie_word_embeddings": False,
    "quantization_config": _FP8,
}

_FLASH: Mapping[str, Any] = {
    **_V4,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "index_topk": 512,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}

_PRO: Mapping[str, Any] = {
    **_V4,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "index_topk": 1024,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}

_FLASH_DSPARK: Mapping[str, Any] = {
    "compress_ratios": [*_FLASH["compress_ratios"], 0, 0],
    "dspark_block_size": 5,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}

_PRO_DSPARK: Mapping[str, Any] = {
    "compress_ratios": [*_PRO["compress_ratios"], 0, 0],
    "dspark_block_size": 5,
    "dspark_target_layer_ids": [58, 59, 60],
    "dspark_markov_rank": 512,
}

_FP4_EXPERTS: Mapping[str, Any] = {"expert_dtype": "fp4"}

_V32: Mapping[str, Any] = {
    "model_type": "deepseek_v32",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "quantization_config": _FP8,
}

FLASH_DSPARK = "deepseek-ai/DeepSeek-V4-Flash-DSpark"
PRO_DSPARK = "deepseek-ai/DeepSeek-V4-Pro-DSpark"
BASELINE = "deepseek-ai/DeepSeek-V3.2"

CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "deepseek-ai/DeepSeek-V4-Flash": {**_FLASH, **_FP4_EXPERTS},
    "deepseek-ai/DeepSeek-V4-Flash-Base": _FLASH,
    FLASH_DSPARK: {**_FLASH, **_FP4_EXPERTS, **_FLASH_DSPARK},
    "deepseek-ai/DeepSeek-V4-Flash-0731": {**_FLASH, **_FP4_EXPERTS, **_FLASH_DSPARK},
    "deepseek-ai/DeepSeek-V4-Pro": {**_PRO, **_FP4_EXPERTS},
    "deepseek-ai/DeepSeek-V4-Pro-Base": _PRO,
    PRO_DSPARK: {**_PRO, **_FP4_EXPERTS, **_PRO_DSPARK},
    "deepseek-ai/DeepSeek-V4-Pro-0813": {**_PRO, **_FP4_EXPERTS, **_PRO_DSPARK},
    BASELINE: _V32,
    "deepseek-ai/DeepSeek-V3.2-Exp": _V32,
}

# releases whose DSpark module is published beside them
DRAFTER_RELEASES: Mapping[str, str] = {
    "deepseek-ai/DeepSeek-V4-Flash": FLASH_DSPARK,
    "deepseek-ai/DeepSeek-V4-Pro": PRO_DSPARK,
}


@dataclass(frozen=True)
class Claim:
    """What the technical report of DeepSeek-V4 (arXiv 2606.19348) publishes of a model.

    Args:
        total: parameters, in billions.
        active: parameters that a token passes, in billions.
        flops_ratio: FLOPs of a decoded token at 1M tokens over those of DeepSeek-V3.2, in equivalent FP8 FLOPs.
        cache_ratio: bytes of KV cache at 1M tokens over those of DeepSeek-V3.2.
    """

    total: float
    active: float
    flops_ratio: float | None = None
    cache_ratio: float | None = None


FLASH_CLAIM = Claim(total=284, active=13, flops_ratio=0.10, cache_ratio=0.07)
PRO_CLAIM = Claim(total=1600, active=49, flops_ratio=0.27, cache_ratio=0.10)
V32_CLAIM = Claim(total=671, active=37)


def claim_of(name: str) -> Claim | None:
    """Return what is published of a known model; None for every other."""
    if name not in CONFIGURATIONS:
        return None
    if "V3.2" in name:
        return V32_CLAIM
    return PRO_CLAIM if "V4-Pro" in name else FLASH_CLAIM
