"""Bytes of KV caches by what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dspark_hf.modeling.deepseek_v4.estimation.formats import ELEMENT_BYTES, FP4_GROUP, CacheFormat
from dspark_hf.modeling.deepseek_v4.estimation.shapes import (
    AttentionKind,
    AttentionLayer,
    DeepseekV4Shape,
    DeepseekV32Shape,
    DrafterShape,
    Shape,
)

# elements that share a scale
V4_FP8_GROUP = 64
V32_FP8_GROUP = 128


@dataclass(frozen=True)
class CachePart:
    """What one part of a cache takes for one sequence.

    Args:
        num_layers: layers that have it.
        num_bytes: bytes at the context asked for, all layers.
        bytes_per_token: what one more token adds in the long run, all layers; 0 for what does not grow.
    """

    num_layers: int
    num_bytes: int
    bytes_per_token: float


@dataclass(frozen=True)
class KVCache:
    """The cache of `batch_size` sequences by part; parts are of one sequence."""

    parts: dict[str, CachePart]
    batch_size: int

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes of one sequence."""
        return sum(part.num_bytes for part in self.parts.values())

    @property
    def bytes_per_token(self) -> float:
        """What one more token adds in the long run, one sequence."""
        return sum(part.bytes_per_token for part in self.parts.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all sequences."""
        return self.batch_size * self.bytes_per_sequence


def count_kv_cache(shape: Shape, context: int, batch_size: int, cache_format: CacheFormat) -> KVCache:
    """Return the target's cache at a context length in tokens."""
    if isinstance(shape, DeepseekV32Shape):
        pairs = _v32_parts(shape, context, cache_format)
    else:
        pairs = _v4_parts(shape, context, cache_format)
    return KVCache(_summed(pairs), batch_size)


def count_drafter_cache(
    shape: DeepseekV4Shape, drafter: DrafterShape, context: int, batch_size: int, cache_format: CacheFormat
) -> KVCache:
    """Return the cache of a DSpark module: a window of the target's context per stage; the block is never kept."""
    part = _window(shape, context, cache_format)
    stages = CachePart(drafter.num_stages, drafter.num_stages * part.num_bytes, 0.0)
    return KVCache({"windows": stages}, batch_size)


def v4_entry_bytes(shape: DeepseekV4Shape, cache_format: CacheFormat) -> int:
    """Return the bytes of one entry, key and value at once: as released, FP8 with the rotated part in bf16."""
    if cache_format is not CacheFormat.released:
        return shape.head_dim * ELEMENT_BYTES[cache_format.value]
    quantised = shape.head_dim - shape.qk_rope_head_dim
    return quantised + _groups(quantised, V4_FP8_GROUP) + 2 * shape.qk_rope_head_dim


def v4_index_key_bytes(shape: DeepseekV4Shape, cache_format: CacheFormat) -> int:
    """Return the bytes of one key of an indexer: FP4 as released."""
    if cache_format is not CacheFormat.released:
        return shape.index_head_dim * ELEMENT_BYTES[cache_format.value]
    return _groups(shape.index_head_dim, 2) + _groups(shape.index_head_dim, FP4_GROUP)


def v32_entry_bytes(shape: DeepseekV32Shape, cache_format: CacheFormat) -> int:
    """Return the bytes of one latent entry: as released, FP8 with fp32 scales, and the rotated key in bf16."""
    if cache_format is not CacheFormat.released:
        return (shape.kv_lora_rank + shape.qk_rope_head_dim) * ELEMENT_BYTES[cache_format.value]
    return shape.kv_lora_rank + 4 * _groups(shape.kv_lora_rank, V32_FP8_GROUP) + 2 * shape.qk_rope_head_dim


def v32_index_key_bytes(shape: DeepseekV32Shape, cache_format: CacheFormat) -> int:
    """Return the bytes of one key of an indexer: as released, FP8 with an fp32 scale."""
    if cache_format is not CacheFormat.released:
        return shape.index_head_dim * ELEMENT_BYTES[cache_format.value]
    return shape.index_head_dim + 4 * _groups(shape.index_head_dim, V32_FP8_GROUP)


def _v4_parts(shape: DeepseekV4Shape, context: int, cache_format: CacheFormat) -> Iterator[tuple[str, CachePart]]:
    entry, key = v4_entry_bytes(shape, cache_format), v4_index_key_bytes(shape, cache_format)
    for layer in shape.layers:
        yield "sliding windows", _window(shape, context, cache_format)
        if layer.kind is AttentionKind.sliding:
            continue
        rate = layer.compress_rate
        num_entries = context // rate
        yield f"{layer.kind.value.upper()} entries", CachePart(1, num_entries * entry, entry / rate)
        if layer.kind is AttentionKind.csa:
            yield "CSA indexer keys", CachePart(1, num_entries * key, key / rate)
        yield "pending tokens", CachePart(1, _pending_bytes(shape, layer), 0.0)


def _v32_parts(shape: DeepseekV32Shape, context: int, cache_format: CacheFormat) -> Iterator[tuple[str, CachePart]]:
    entry, key = v32_entry_bytes(shape, cache_format), v32_index_key_bytes(shape, cache_format)
    layers = shape.num_hidden_layers
    yield "latent entries", CachePart(layers, layers * context * entry, float(layers * entry))
    yield "indexer keys", CachePart(layers, layers * context * key, float(layers * key))


def _window(shape: DeepseekV4Shape, context: int, cache_format: CacheFormat) -> CachePart:
    return CachePart(1, min(shape.sliding_window, context) * v4_entry_bytes(shape, cache_format), 0.0)


def _pending_bytes(shape: DeepseekV4Shape, layer: AttentionLayer) -> int:
    """Return the bytes of tokens that are not compressed yet: their vectors and gates, fp32 whatever the format."""
    if layer.kind is AttentionKind.hca:
        num_values = layer.compress_rate * shape.head_dim
    else:
        # two windows of two series each, for the entries and for the indexer's keys
        num_values = 2 * layer.compress_rate * 2 * (shape.head_dim + shape.index_head_dim)
    return 2 * num_values * ELEMENT_BYTES["fp32"]


def _summed(pairs: Iterator[tuple[str, CachePart]]) -> dict[str, CachePart]:
    parts: dict[str, CachePart] = {}
    for name, part in pairs:
        known = parts.get(name, CachePart(0, 0, 0.0))
        parts[name] = CachePart(
            known.num_layers + part.num_layers,
            known.num_bytes + part.num_bytes,
            known.bytes_per_token + part.bytes_per_token,
        )
    return dict(sorted(parts.items(), key=lambda item: -item[1].num_bytes))


def _groups(size: int, group: int) -> int:
    return -(-size // group)
