"""Write random drafters in the layout of the released DeepSpec checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB_SIZE = 48
HIDDEN_SIZE = 32
NUM_TARGET_LAYERS = 6
TARGET_LAYER_IDS = [1, 3, 4]
NUM_LAYERS = 2
BLOCK_SIZE = 5
INTERMEDIATE_SIZE = 40

# what the released files copy from their targets: much of it is wrong for the drafter
_QWEN3_FIELDS: dict[str, Any] = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "intermediate_size": INTERMEDIATE_SIZE,
    "max_window_layers": NUM_TARGET_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "sliding_window": None,
    "use_sliding_window": False,
}
_GEMMA4_FIELDS: dict[str, Any] = {
    "architectures": ["Gemma4DSparkModel"],
    "model_type": "gemma4_text",
    "target_model_type": "gemma4",
    "target_text_model_type": "gemma4_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "enable_moe_block": False,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 16,
    # of the target's sliding layers: the drafter's heads are the global ones
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "intermediate_size": INTERMEDIATE_SIZE,
    "num_attention_heads": 4,
    "num_global_key_value_heads": 1,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 0,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 8,
    "use_bidirectional_attention": None,
    "use_double_wide_mlp": False,
}


@dataclass(frozen=True)
class Layout:
    """Which of the released kinds of drafter to write; `markov_head_type` None is a plain DFlash drafter."""

    backbone: str = "qwen3"
    markov_head_type: str | None = "vanilla"
    confidence: str = "markov"
    attention_k_eq_v: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def markov_rank(self) -> int:
        """Rank of the Markov head."""
        return 0 if self.markov_head_type is None else 6

    @property
    def name(self) -> str:
        """Short name for a test's id."""
        values = "k=v" if self.attention_k_eq_v else ""
        return "-".join(filter(None, [self.backbone, values, self.markov_head_type or "dflash", self.confidence]))


def all_layouts() -> list[Layout]:
    """Return every kind of drafter that the format allows."""
    layouts = []
    for backbone, k_eq_v in (("qwen3", False), ("gemma4", False), ("gemma4", True)):
        for head in ("vanilla", "gated", "rnn"):
            layouts += [Layout(backbone, head, confidence, k_eq_v) for confidence in ("markov", "plain", "none")]
        layouts += [Layout(backbone, None, confidence, k_eq_v) for confidence in ("plain", "none")]
    return layouts


def deepspec_fields(layout: Layout) -> dict[str, Any]:
    """Return the `config.json` of a drafter."""
    fields: dict[str, Any] = {
        **(_QWEN3_FIELDS if layout.backbone == "qwen3" else _GEMMA4_FIELDS),
        "block_size": BLOCK_SIZE,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "enable_confidence_head": layout.confidence != "none",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": 0.02,
        "layer_types": ["full_attention"] * NUM_LAYERS,
        "markov_rank": layout.markov_rank,
        "mask_token_id": 4,
        "max_position_embeddings": 512,
        "num_anchors": 512,
        "num_hidden_layers": NUM_LAYERS,
        "num_target_layers": NUM_TARGET_LAYERS,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "target_layer_ids": TARGET_LAYER_IDS,
        "tie_word_embeddings": False,
        "transformers_version": "5.10.2",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }
    if layout.confidence != "none":
        fields["confidence_head_with_markov"] = layout.confidence == "markov"
    if layout.markov_head_type is not None:
        fields["markov_head_type"] = layout.markov_head_type
    if layout.backbone == "gemma4":
        fields["attention_k_eq_v"] = layout.attention_k_eq_v
    return fields


def deepspec_weights(layout: Layout, *, seed: int = 0) -> dict[str, Tensor]:
    """Return the tensors of a random drafter."""
    fields = deepspec_fields(layout)
    is_gemma, rank = layout.backbone == "gemma4", layout.markov_rank
    head_dim = fields["global_head_dim"] if is_gemma else fields["head_dim"]
    kv_heads = fields["num_global_key_value_heads"] if layout.attention_k_eq_v else fields["num_key_value_heads"]
    width, kv_width = fields["num_attention_heads"] * head_dim, kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (VOCAB_SIZE, HIDDEN_SIZE),
        "lm_head.weight": (VOCAB_SIZE, HIDDEN_SIZE),
        "fc.weight": (HIDDEN_SIZE, len(TARGET_LAYER_IDS) * HIDDEN_SIZE),
        "hidden_norm.weight": (HIDDEN_SIZE,),
        "norm.weight": (HIDDEN_SIZE,),
    }
    for layer in range(NUM_LAYERS):
        shapes |= {
            f"layers.{layer}.input_layernorm.weight": (HIDDEN_SIZE,),
            f"layers.{layer}.post_attention_layernorm.weight": (HIDDEN_SIZE,),
            f"layers.{layer}.self_attn.q_proj.weight": (width, HIDDEN_SIZE),
            f"layers.{layer}.self_attn.k_proj.weight": (kv_width, HIDDEN_SIZE),
            f"layers.{layer}.self_attn.o_proj.weight": (HIDDEN_SIZE, width),
            f"layers.{layer}.self_attn.q_norm.weight": (head_dim,),
            f"layers.{layer}.self_attn.k_norm.weight": (head_dim,),
            f"layers.{layer}.mlp.gate_proj.weight": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            f"layers.{layer}.mlp.up_proj.weight": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            f"layers.{layer}.mlp.down_proj.weight": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
        }
        if not layout.attention_k_eq_v:
            shapes[f"layers.{layer}.self_attn.v_proj.weight"] = (kv_width, HIDDEN_SIZE)
        if is_gemma:
            shapes[f"layers.{layer}.pre_feedforward_layernorm.weight"] = (HIDDEN_SIZE,)
            shapes[f"layers.{layer}.post_feedforward_layernorm.weight"] = (HIDDEN_SIZE,)
            shapes[f"layers.{layer}.layer_scalar"] = (1,)
    if rank:
        shapes["markov_head.markov_w1.weight"] = (VOCAB_SIZE, rank)
        shapes["markov_head.markov_w2.weight"] = (VOCAB_SIZE, rank)
    if layout.markov_head_type == "gated":
        shapes["markov_head.gate_proj.weight"] = (rank, HIDDEN_SIZE + rank)
        shapes["markov_head.gate_proj.bias"] = (rank,)
    if layout.markov_head_type == "rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + HIDDEN_SIZE)
        shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    if layout.confidence != "none":
        shapes["confidence_head.proj.weight"] = (1, HIDDEN_SIZE + (rank if layout.confidence == "markov" else 0))
        shapes["confidence_head.proj.bias"] = (1,)
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, shape, generator).to(layout.dtype) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if "norm" in name or name.endswith("layer_scalar"):
        return 1 + 0.2 * values
    # large enough that slots, context and heads all matter to the argmax
    return values * {"markov_head.markov_w1.weight": 1.0, "embed_tokens.weight": 1.0}.get(name, 0.3)


def write_deepspec(folder: Path, layout: Layout, *, seed: int = 0) -> dict[str, Tensor]:
    """Write a random drafter into `folder` and return its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = deepspec_weights(layout, seed=seed)
    (folder / "config.json").write_text(json.dumps(deepspec_fields(layout), indent=2), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights
