"""The tensors of a model by shape. Legend: D hidden, H heads, C head size, F expert width, E experts, V vocab."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from dspark_hf.modeling.deepseek_v4.estimation.formats import Arithmetic
from dspark_hf.modeling.deepseek_v4.estimation.shapes import (
    AttentionKind,
    AttentionLayer,
    DeepseekV4Shape,
    DeepseekV32Shape,
    DrafterShape,
    Shape,
)


@dataclass(frozen=True)
class Tensor:
    """Equal tensors of a checkpoint.

    Args:
        part: part of the model they belong to.
        shape: `(outputs, inputs)` for matrices.
        kind: `"linear"` and `"expert"` are what releases quantise; `"kept"` stays in bf16, `"fp32"` in fp32, `"ids"`
            in int64.
        arithmetic: what the product with a token is computed in; None where there is no such product.
        count: how many there are.
        num_active: how many of them a token passes; None means all.
        is_buffer: whether Transformers counts them as no parameters.
    """

    part: str
    shape: tuple[int, ...]
    kind: str
    arithmetic: Arithmetic | None = None
    count: int = 1
    num_active: int | None = None
    is_buffer: bool = False

    @property
    def num_parameters(self) -> int:
        """Elements of all of them, 0 for buffers."""
        return 0 if self.is_buffer else self.count * prod(self.shape)

    @property
    def num_active_parameters(self) -> int:
        """Elements of those that a token passes, 0 for buffers."""
        active = self.count if self.num_active is None else self.num_active
        return 0 if self.is_buffer else active * prod(self.shape)


def target_tensors(shape: Shape) -> list[Tensor]:
    """Return the tensors of a target, without drafter and MTP module."""
    if isinstance(shape, DeepseekV32Shape):
        return list(_v32_tensors(shape))
    return list(_v4_tensors(shape))


def drafter_tensors(shape: DeepseekV4Shape, drafter: DrafterShape) -> list[Tensor]:
    """Return the tensors of a DSpark module, without the embedding and the output head, which are the target's."""
    width, rank = shape.hidden_size, drafter.markov_rank
    tensors = [
        replace(tensor, count=tensor.count * drafter.num_stages)
        for tensor in (*_v4_attention(shape), *_v4_block(shape), *_moe(shape), _gate_bias(shape))
    ]
    tensors += [
        _linear("injection", width, drafter.num_tapped_layers * width),
        Tensor("injection", (width,), "kept"),
        Tensor("norms", (width,), "kept"),
        Tensor("Markov head", (shape.vocab_size, rank), "kept", count=2),
        Tensor("confidence head", (1, width + rank), "kept"),
        *_hyper_head(shape),
    ]
    return tensors


def _v4_tensors(shape: DeepseekV4Shape) -> Iterator[Tensor]:
    yield from _ends(shape)
    yield from _hyper_head(shape)
    for index, layer in enumerate(shape.layers):
        yield from _v4_attention(shape)
        yield from _compression(shape, layer)
        yield from _v4_block(shape)
        yield from _moe(shape)
        # a hash layer has a table of experts per token in place of the bias
        if index < shape.num_hash_layers:
            yield Tensor("router", (shape.vocab_size, shape.num_experts_per_tok), "ids", is_buffer=True)
        else:
            yield _gate_bias(shape)


def _v32_tensors(shape: DeepseekV32Shape) -> Iterator[Tensor]:
    yield from _ends(shape)
    width = shape.hidden_size
    for index in range(shape.num_hidden_layers):
        yield from _v32_attention(shape)
        yield Tensor("norms", (width,), "kept", count=2)
        if index < shape.num_dense_layers:
            yield from _mlp("dense layers", width, shape.intermediate_size)
        else:
            yield from _moe(shape)
            yield _gate_bias(shape)


def _ends(shape: Shape) -> Iterator[Tensor]:
    table = (shape.vocab_size, shape.hidden_size)
    # a token reads one row
    yield Tensor("embedding", table, "kept", num_active=0)
    # a tied head has no tensor of its own, but its product is computed all the same
    yield Tensor("head", table, "kept", Arithmetic.bf16, count=0 if shape.tie_word_embeddings else 1, num_active=1)
    yield Tensor("norms", (shape.hidden_size,), "kept")


def _v4_attention(shape: DeepseekV4Shape) -> Iterator[Tensor]:
    width, heads, group_rank = shape.hidden_size, shape.num_attention_heads, shape.o_groups * shape.o_lora_rank
    yield _linear("attention", shape.q_lora_rank, width)
    yield _linear("attention", heads * shape.head_dim, shape.q_lora_rank)
    yield _linear("attention", shape.head_dim, width)
    # block diagonal; stored in FP8, computed in bf16
    yield Tensor("attention", (group_rank, heads * shape.head_dim // shape.o_groups), "linear", Arithmetic.bf16)
    yield _linear("attention", width, group_rank)
    yield Tensor("norms", (shape.q_lora_rank,), "kept")
    yield Tensor("norms", (shape.head_dim,), "kept")
    yield Tensor("attention", (heads,), "fp32")


def _compression(shape: DeepseekV4Shape, layer: AttentionLayer) -> Iterator[Tensor]:
    if layer.kind is AttentionKind.hca:
        yield from _compressor("compressors", shape.hidden_size, shape.head_dim, shape.head_dim, layer.compress_rate)
    if layer.kind is AttentionKind.csa:
        size, index_size = shape.head_dim, shape.index_head_dim
        # two series: windows overlap
        yield from _compressor("compressors", shape.hidden_size, 2 * size, size, layer.compress_rate)
        yield from _compressor("indexers", shape.hidden_size, 2 * index_size, index_size, layer.compress_rate)
        yield _linear("indexers", shape.index_n_heads * index_size, shape.q_lora_rank)
        yield _kept("indexers", shape.index_n_heads, shape.hidden_size)


def _compressor(part: str, width: int, series: int, size: int, rate: int) -> Iterator[Tensor]:
    yield replace(_kept(part, series, width), count=2)
    yield Tensor(part, (rate, series), "fp32")
    yield Tensor("norms", (size,), "kept")


def _v4_block(shape: DeepseekV4Shape) -> Iterator[Tensor]:
    streams = shape.hc_mult
    mixed = (2 + streams) * streams
    yield Tensor("norms", (shape.hidden_size,), "kept", count=2)
    yield Tensor("hyper-connections", (mixed, streams * shape.hidden_size), "fp32", Arithmetic.bf16, count=2)
    yield Tensor("hyper-connections", (mixed,), "fp32", count=2)
    yield Tensor("hyper-connections", (3,), "fp32", count=2)


def _hyper_head(shape: DeepseekV4Shape) -> Iterator[Tensor]:
    streams = shape.hc_mult
    yield Tensor("hyper-connections", (streams, streams * shape.hidden_size), "fp32", Arithmetic.bf16)
    yield Tensor("hyper-connections", (streams,), "fp32")
    yield Tensor("hyper-connections", (1,), "fp32")


def _v32_attention(shape: DeepseekV32Shape) -> Iterator[Tensor]:
    width, heads = shape.hidden_size, shape.num_attention_heads
    key_size = shape.qk_nope_head_dim + shape.qk_rope_head_dim
    yield _linear("attention", shape.q_lora_rank, width)
    yield _linear("attention", heads * key_size, shape.q_lora_rank)
    yield _linear("attention", shape.kv_lora_rank + shape.qk_rope_head_dim, width)
    # absorbed into query and output when decoding, there in bf16
    up = (heads * (shape.qk_nope_head_dim + shape.v_head_dim), shape.kv_lora_rank)
    yield Tensor("attention", up, "linear", Arithmetic.bf16)
    yield _linear("attention", width, heads * shape.v_head_dim)
    yield Tensor("norms", (shape.q_lora_rank,), "kept")
    yield Tensor("norms", (shape.kv_lora_rank,), "kept")
    yield _linear("indexers", shape.index_n_heads * shape.index_head_dim, shape.q_lora_rank)
    yield _linear("indexers", shape.index_head_dim, width)
    # a layer norm: weight and bias
    yield Tensor("norms", (shape.index_head_dim,), "kept", count=2)
    yield _kept("indexers", shape.index_n_heads, width)


def _moe(shape: Shape) -> Iterator[Tensor]:
    width, inner = shape.hidden_size, shape.moe_intermediate_size
    yield _kept("router", shape.n_routed_experts, width)
    for tensor in _mlp("routed experts", width, inner):
        yield replace(
            tensor,
            kind="expert",
            count=tensor.count * shape.n_routed_experts,
            num_active=tensor.count * shape.num_experts_per_tok,
        )
    yield from _mlp("shared experts", width, shape.n_shared_experts * inner)


def _mlp(part: str, width: int, inner: int) -> Iterator[Tensor]:
    yield replace(_linear(part, inner, width), count=2)
    yield _linear(part, width, inner)


def _gate_bias(shape: Shape) -> Tensor:
    return Tensor("router", (shape.n_routed_experts,), "fp32", is_buffer=True)


def _linear(part: str, rows: int, columns: int) -> Tensor:
    return Tensor(part, (rows, columns), "linear", Arithmetic.fp8)


def _kept(part: str, rows: int, columns: int) -> Tensor:
    return Tensor(part, (rows, columns), "kept", Arithmetic.bf16)
