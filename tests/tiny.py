"""Tiny random targets of many families: seconds to build, long enough to show a wrong position or a wrong mask."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 64
HIDDEN_SIZE = 32
SLIDING_WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # large enough that greedy text wanders instead of repeating one token
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}
_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": SLIDING_WINDOW,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": SLIDING_WINDOW},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": SLIDING_WINDOW,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**_HYBRID, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        **_HYBRID,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "final_logit_softcapping": 30.0,
    },
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "gpt2": {},
    # a small head needs all of it rotated to tell positions apart
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
}
# families whose layers see less, or count otherwise, than others: tests of their own try them
_SPECIAL: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
        "attention_chunk_size": SLIDING_WINDOW,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
    },
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": HIDDEN_SIZE, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "use_cache": True},
    "falcon": {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "num_heads": 4,
        "window_size": SLIDING_WINDOW,
    },
}
# what they call by other names, or have none of
_UNNAMED = {
    "bloom": ("num_hidden_layers", "num_attention_heads"),
    "mpt": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "gpt_neo": ("num_hidden_layers", "num_attention_heads"),
}
FAMILIES = tuple(_FAMILIES)
SPECIAL_FAMILIES = tuple(_SPECIAL)
# a family whose sliding layers forget what lies before the window
SLIDING_FAMILIES = ("mistral", "gemma2", "gemma3_text", "gemma4_text")


def tiny_config(family: str, **overrides: Any) -> Any:
    """Return the configuration of the tiny target of `family`, with `overrides`."""
    fields = {**_COMMON, **_FAMILIES.get(family, {}), **_SPECIAL.get(family, {}), **overrides}
    if family in _UNNAMED or family == "falcon":
        for name in (*_UNNAMED.get(family, ()), "num_key_value_heads", "head_dim"):
            del fields[name]
    if family == "gpt2":
        # GPT-2 names its sizes otherwise
        fields["n_inner"] = fields.pop("intermediate_size")
    if family in ("gpt2", "gpt_neox"):
        del fields["num_key_value_heads"], fields["head_dim"]
    return AutoConfig.for_model(family, **fields)


def tiny_target(
    family: str = "llama", *, seed: int = 1, attn_implementation: str | None = None, **overrides: Any
) -> PreTrainedModel:
    """Return a small random causal LM of `family`, fp32, in evaluation mode; the same for the same arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_config(family, **overrides)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
        _liven(model)
    return model.eval()


@torch.no_grad()
def _liven(model: PreTrainedModel) -> None:
    # norms start as the identity and biases as zero: random ones show a missing or misplaced factor
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
