"""FLOPs of one decoded token: two per multiplication of a matrix product, everything else left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dspark_hf.modeling.deepseek_v4.estimation.formats import FP8_EQUIVALENT, Arithmetic
from dspark_hf.modeling.deepseek_v4.estimation.shapes import (
    AttentionKind,
    AttentionLayer,
    DeepseekV4Shape,
    DeepseekV32Shape,
    Shape,
)
from dspark_hf.modeling.deepseek_v4.estimation.tensors import target_tensors

EXPERTS = ("routed experts", "shared experts", "dense layers", "router")


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one part of a model: as they are, and in the time of FP8 operations."""

    plain: int
    fp8_equivalent: float


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token by part, the largest first."""

    parts: dict[str, PartFlops]

    @property
    def plain(self) -> int:
        """FLOPs whatever they are computed in."""
        return sum(part.plain for part in self.parts.values())

    @property
    def fp8_equivalent(self) -> float:
        """FLOPs in the time of FP8 operations: FP4 counts half, bf16 double."""
        return sum(part.fp8_equivalent for part in self.parts.values())


def count_flops(shape: Shape, context: int) -> Flops:
    """Return the FLOPs of decoding one token whose context, itself included, has `context` tokens."""
    parts: dict[str, PartFlops] = {}
    for name, flops, arithmetic in (*_projections(shape), *_attention(shape, context)):
        known = parts.get(name, PartFlops(0, 0.0))
        weighted = flops * FP8_EQUIVALENT[arithmetic]
        parts[name] = PartFlops(known.plain + flops, known.fp8_equivalent + weighted)
    return Flops(dict(sorted(parts.items(), key=lambda item: -item[1].plain)))


def _projections(shape: Shape) -> Iterator[tuple[str, int, Arithmetic]]:
    for tensor in target_tensors(shape):
        if tensor.arithmetic is None or not tensor.num_active_parameters:
            continue
        if tensor.part in EXPERTS:
            name = "experts"
        else:
            name = "head" if tensor.part == "head" else "projections"
        yield name, 2 * tensor.num_active_parameters, tensor.arithmetic


def _attention(shape: Shape, context: int) -> Iterator[tuple[str, int, Arithmetic]]:
    if isinstance(shape, DeepseekV32Shape):
        yield from _v32_attention(shape, context)
        return
    for layer in shape.layers:
        yield from _v4_attention(shape, layer, context)


def _v4_attention(
    shape: DeepseekV4Shape, layer: AttentionLayer, context: int
) -> Iterator[tuple[str, int, Arithmetic]]:
    num_seen = min(shape.sliding_window, context)
    if layer.kind is not AttentionKind.sliding:
        num_entries = context // layer.compress_rate
        num_seen += min(num_entries, shape.index_topk) if layer.kind is AttentionKind.csa else num_entries
    # an entry is key and value: one product each
    yield "attention", 2 * shape.num_attention_heads * 2 * shape.head_dim * num_seen, Arithmetic.bf16
    if layer.kind is AttentionKind.csa:
        num_scored = context // layer.compress_rate
        yield "indexer scores", 2 * shape.index_n_heads * shape.index_head_dim * num_scored, Arithmetic.fp4


def _v32_attention(shape: DeepseekV32Shape, context: int) -> Iterator[tuple[str, int, Arithmetic]]:
    # absorbed form: keys are latent and rotated part, values the latent part
    entry = 2 * shape.kv_lora_rank + shape.qk_rope_head_dim
    num_seen = min(context, shape.index_topk)
    layers = shape.num_hidden_layers
    yield "attention", layers * 2 * shape.num_attention_heads * entry * num_seen, Arithmetic.bf16
    yield "indexer scores", layers * 2 * shape.index_n_heads * shape.index_head_dim * context, Arithmetic.fp8
