"""The sizes that decide memory and FLOPs, named as in the configurations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class AttentionKind(str, Enum):
    """What a layer attends to besides its sliding window."""

    sliding = "sliding"
    # compressed sparse attention: entries that an indexer selects
    csa = "csa"
    # heavily compressed attention: all entries
    hca = "hca"


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of one layer: its kind, and how many tokens become one entry (0 for a plain window)."""

    kind: AttentionKind
    compress_rate: int


@dataclass(frozen=True)
class DrafterShape:
    """A DSpark module: stages of the target's own layer shape, and heads (arXiv 2607.05147).

    Args:
        num_stages: layers of the drafter.
        num_tapped_layers: target layers whose outputs it reads.
        markov_rank: rank of the Markov head.
        block_size: drafted tokens per round it is trained for.
    """

    num_stages: int
    num_tapped_layers: int
    markov_rank: int
    block_size: int


@dataclass(frozen=True)
class DeepseekV4Shape:
    """The sizes of a DeepSeek-V4 model. `drafter` is None where the release brings no DSpark module."""

    vocab_size: int
    hidden_size: int
    layers: tuple[AttentionLayer, ...]
    num_hash_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    hc_mult: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    drafter: DrafterShape | None


@dataclass(frozen=True)
class DeepseekV32Shape:
    """The sizes of a DeepSeek-V3.2 model: latent attention over the tokens that an indexer selects."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_dense_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    tie_word_embeddings: bool


Shape = DeepseekV4Shape | DeepseekV32Shape


@dataclass(frozen=True)
class Quantization:
    """How a release stores its large matrices.

    Args:
        linear: `"fp8"` or `"bf16"`: attention, shared experts and other dense layers.
        expert: `"fp4"`, `"fp8"` or `"bf16"`: routed experts.
        fp8_scale_bytes: bytes of a scale of an FP8 block: 1 (E8M0) or 4 (F32).
    """

    linear: str
    expert: str
    fp8_scale_bytes: int


@dataclass(frozen=True)
class Model:
    """A model to estimate.

    Args:
        name: what the user called it.
        shape: its sizes.
        quantization: how its release stores the weights.
        drafter_release: name of the release that brings the DSpark module, where this one does not.
    """

    name: str
    shape: Shape
    quantization: Quantization
    drafter_release: str | None = None
