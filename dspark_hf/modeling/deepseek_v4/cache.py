"""The cache of DeepSeek-V4: window, compressed entries, indexer keys, uncompressed tail; rows of their own lengths.

Everything is found by position, so the state follows from the rows' lengths alone and taking tokens back is exact.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from dspark_hf.generation.targets.trees import Tree
from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.deepseek_v4.storage import (
    Codec,
    Entries,
    Fp4Codec,
    Fp8Codec,
    PlainCodec,
    Ring,
    Span,
    make_span,
)


class CompressedStore:
    """What one compressor remembers: entries, and the tokens that the next entries are made from.

    Args:
        ratio: tokens per entry.
        num_windows: windows of tokens an entry is made from (2 where windows overlap).
        max_rollback: tokens that can be taken back.
        codec: how entries are stored.
    """

    def __init__(self, ratio: int, num_windows: int, max_rollback: int, codec: Codec):
        self.tail = Ring(num_windows * ratio - 1 + max_rollback, PlainCodec())
        self.entries = Entries(codec)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        self.tail.select_rows(rows)
        self.entries.select_rows(rows)

    def append_rows(self, other: CompressedStore, num_rows: int, num_new: int) -> None:
        """Append the `num_new` rows of another store of the same layer to these `num_rows`."""
        self.tail.append_rows(other.tail, num_rows, num_new)
        self.entries.append_rows(other.entries, num_rows, num_new)

    @property
    def num_bytes(self) -> int:
        """Memory in bytes."""
        return self.tail.num_bytes + self.entries.num_bytes


class DeepseekV4LayerCache(CacheLayerMixin):
    """One layer's share of the cache. Lengths belong to the whole cache, which is why most methods live there."""

    is_croppable = True
    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, config: DeepseekV4DSparkConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        kind, ratio = config.attention_kinds[layer], config.compress_ratios[layer]
        codec: Codec = PlainCodec() if config.cache_dtype is None else Fp8Codec(config.qk_rope_head_dim, dtype)
        self.window = Ring(config.sliding_window - 1 + config.max_rollback, codec)
        self.compressed: CompressedStore | None = None
        self.index: CompressedStore | None = None
        if kind != "window":
            self.compressed = CompressedStore(ratio, 2 if kind == "csa" else 1, config.max_rollback, codec)
        if kind == "csa":
            index_codec: Codec = PlainCodec() if config.indexer_dtype is None else Fp4Codec()
            self.index = CompressedStore(ratio, 2, config.max_rollback, index_codec)

    @property
    def _stores(self) -> list[Any]:
        return [store for store in (self.window, self.compressed, self.index) if store is not None]

    @property
    def num_bytes(self) -> int:
        """Memory in bytes."""
        return sum(store.num_bytes for store in self._stores)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch, in that order."""
        for store in self._stores:
            store.select_rows(rows)

    def append_rows(self, other: DeepseekV4LayerCache, num_rows: int, num_new: int) -> None:
        """Append the `num_new` rows of another cache of the same layer to these `num_rows`."""
        for store, new in zip(self._stores, other._stores, strict=True):
            store.append_rows(new, num_rows, num_new)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: stores make room when they are written."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise: keys and values of this cache are written by DeepSeek-V4's own attention."""
        raise NotImplementedError("The cache of DeepSeek-V4 is written by its own attention only.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Raise: masks follow from positions."""
        raise NotImplementedError("DeepSeek-V4 builds its masks from positions.")

    def get_seq_length(self) -> int:
        """Raise: lengths belong to the whole cache."""
        raise NotImplementedError("Ask the cache for its length, not a layer.")

    def get_max_length(self) -> int:
        """Return -1: it grows."""
        return -1

    get_max_cache_shape = get_max_length


class DeepseekV4DSparkCache(DynamicCache):
    """Cache of a `DeepseekV4DSparkForCausalLM`, with exact rollback per row; a `RowwiseCache` of drafts in a chain.

    Args:
        config: the model's configuration; `max_rollback` tokens can be taken back, `cache_dtype` says how vectors are
            stored, `indexer_dtype` how the indexer's keys are.
        dtype: of the model's activations.

    Example:

        >>> from dspark_hf import DeepseekV4DSparkConfig
        >>> from dspark_hf.modeling.deepseek_v4.cache import DeepseekV4DSparkCache
        >>> cache = DeepseekV4DSparkCache(DeepseekV4DSparkConfig(num_hidden_layers=3, compress_ratios=[0, 4, 128]))
        >>> cache.get_seq_length()
        0
    """

    takes_trees = False

    def __init__(self, config: DeepseekV4DSparkConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self._config, self._dtype = config, dtype
        self.layer_class_to_replicate = None
        self.lengths: list[int] = []
        # the longest each row ever was: how far back its rings reach follows from it
        self._longest: list[int] = []
        self.num_columns = 0
        self.max_rollback = config.max_rollback
        self.reset()

    @property
    def batch_size(self) -> int:
        """Number of rows, or -1 before the first pass."""
        return len(self.lengths) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds anything."""
        return bool(self.lengths)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back without a trace."""
        return self.max_rollback > 0

    @property
    def num_bytes(self) -> int:
        """Memory of all layers in bytes."""
        return sum(layer.num_bytes for layer in self._stores)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns seen so far, padding included."""
        return self.num_columns

    def store(self, layer: int) -> DeepseekV4LayerCache:
        """Return one layer's share."""
        return self._stores[layer]

    def begin(self, num_real: list[int], num_tokens: int, device: torch.device) -> Span:
        """Return the span of a pass over `num_tokens` tokens a row, of which `num_real[r]` are real.

        Raises:
            ValueError: if the batch is not the one the cache holds.
        """
        if not self.lengths:
            self.lengths, self._longest = [0] * len(num_real), [0] * len(num_real)
        if len(self.lengths) != len(num_real):
            raise ValueError(
                f"`cache` must hold as many rows as the input, {len(num_real)}, got {len(self.lengths)}. Pass the "
                "cache of the same batch, or none."
            )
        return make_span(self.lengths, num_real, num_tokens, device)

    def finish(self, span: Span, num_columns: int) -> None:
        """Count a span as held, once every layer has written it; `num_columns` with the padding that was left out."""
        self.lengths = [length + count for length, count in zip(self.lengths, span.num_real, strict=True)]
        self._longest = [max(pair) for pair in zip(self._longest, self.lengths, strict=True)]
        self.num_columns += num_columns

    def take_back(self, num_tokens: Sequence[int]) -> None:
        """Take back the last `num_tokens[r]` tokens of every row; the state is that of never having seen them.

        Raises:
            ValueError: if a row's tokens go further back than the cache remembers.
        """
        lengths = [length - count for length, count in zip(self.lengths, num_tokens, strict=True)]
        pairs = zip(self._longest, lengths, strict=True)
        furthest = max((longest - length for longest, length in pairs), default=0)
        if furthest > self.max_rollback or min(lengths, default=0) < 0:
            raise ValueError(
                f"`max_rollback` must be at least the tokens taken back, {furthest}, got {self.max_rollback}. Set "
                f"`model.config.max_rollback = {furthest}` before generating, or draft fewer tokens."
            )
        self.lengths = lengths

    def pass_inputs(
        self, num_tokens: list[int], width: int, device: torch.device, tree: Tree | None, *, are_drafts: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the positions `(B, T)` of a pass over `width` tokens a row, and the mask of those that are real."""
        columns = torch.arange(width, device=device)
        positions = torch.tensor(self.lengths or [0] * len(num_tokens), device=device)[:, None] + columns
        # without a mask every token is real; the cache knows what came before
        is_padded = min(num_tokens) < width
        is_real = columns < torch.tensor(num_tokens, device=device)[:, None] if is_padded else None
        return positions, {"attention_mask": is_real}

    def keep(self, starts: Sequence[int], kept: Sequence[Sequence[int]]) -> None:
        """Take back every row's tokens behind the kept ones, the first of those that follow `starts[r]`."""
        ends = [start + len(row) for start, row in zip(starts, kept, strict=True)]
        self.take_back([length - end for length, end in zip(self.lengths, ends, strict=True)])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of all rows, as Transformers asks for it.

        Raises:
            ValueError: if `tokens_to_remove` is positive, or more than the cache remembers.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` must be 0 or negative, got {tokens_to_remove}. Give the number of tokens to take "
                "back, negated."
            )
        if tokens_to_remove:
            self.take_back([-tokens_to_remove] * len(self.lengths))
            self.num_columns += tokens_to_remove

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch, in that order; rows may repeat."""
        for store in self._stores:
            store.select_rows(rows)
        index = rows.tolist()
        self.lengths = [self.lengths[row] for row in index]
        self._longest = [self._longest[row] for row in index]

    def append_rows(self, other: DeepseekV4DSparkCache) -> None:
        """Append the rows of another cache of the same model, which ends there."""
        for store, new in zip(self._stores, other._stores, strict=True):
            store.append_rows(new, len(self.lengths), len(other.lengths))
        self.lengths = self.lengths + other.lengths
        self._longest = self._longest + other._longest
        self.num_columns = max(self.num_columns, other.num_columns)

    def returned(self, num_padded: Sequence[int]) -> DeepseekV4DSparkCache:
        """Return the cache; its columns are those of a left-padded output, with `num_padded[r]` before each row."""
        self.num_columns = max(padded + length for padded, length in zip(num_padded, self.lengths, strict=True))
        return self

    def release(self, starts: Sequence[int] | None, num_padded: Sequence[int]) -> None:
        """Take back what an interrupted pass left behind the lengths `starts`, if there was one."""
        if starts is not None:
            self.keep(starts, [()] * len(starts))
        self.returned(num_padded)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rearrange the rows, for beam search."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        if self.lengths:
            self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.lengths:
            rows = torch.arange(len(self.lengths)).repeat_interleave(repeats)
            self.select_rows(rows)

    def reset(self) -> None:
        """Forget everything."""
        layers = range(self._config.num_hidden_layers)
        self._stores = [DeepseekV4LayerCache(self._config, layer, self._dtype) for layer in layers]
        self.layers = list(self._stores)
        self.lengths, self._longest, self.num_columns = [], [], 0

    def activate_past_recording(self) -> None:
        """Nothing: tokens can always be taken back."""
