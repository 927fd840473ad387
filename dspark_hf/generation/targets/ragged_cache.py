"""A cache for several rows of different lengths, for any target with ordinary attention.

A row's token at position p lies in slot p, so a rollback is a change of length.

B batch, T tokens, H key/value heads, E head_dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from dspark_hf.generation.compat import (
    attention_implementation,
    empty_cache_like,
    is_placeholder_layer,
)
from dspark_hf.generation.ragged_store import RaggedLengths, RaggedStore

PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, every token kept; a sliding window lives in the mask alone."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, lengths: RaggedLengths):
        super().__init__()
        self._lengths = lengths
        self.store = RaggedStore()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the store makes room when it is written."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `(B, H, T, E)` behind every row's end and return all slots up to the longest row's new end."""
        self.is_initialized = True
        self.store.write(key_states, value_states, self._lengths.host, self._lengths.device)
        return self.store.read(max(self._lengths.host) + key_states.shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many slots a pass of `query_length` tokens sees, and the first."""
        return max(self._lengths.host) + query_length, 0

    def get_seq_length(self) -> int:
        """Return the longest row's length."""
        return max(self._lengths.host)

    def get_max_length(self) -> int:
        """Return -1: it grows."""
        return -1

    get_max_cache_shape = get_max_length


class RaggedCache(Cache):
    """A cache for `model` in which every row has its own length.

    Raises:
        ValueError: if a layer of the model is no ordinary or sliding attention.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int):
        self.lengths = RaggedLengths(batch_size, model.device)
        # first: Transformers may not know these kinds of layers either
        _check_attention_kinds(model)
        template = empty_cache_like(model)
        self.windows: list[int | None] = []
        layers: list[Any] = []
        for layer in template.layers:
            if type(layer) not in PLAIN_LAYERS and not is_placeholder_layer(layer):
                raise ValueError(
                    "`assistant_model` must be left out for several rows, or padded ones, of a target whose cache has "
                    f"{type(layer).__name__}, as {type(model).__name__} has. Generate the rows one by one, unpadded."
                )
            self.windows.append(getattr(layer, "sliding_window", None))
            layers.append(layer if is_placeholder_layer(layer) else RaggedLayer(self.lengths))
        super().__init__(layers=layers)

    def pretend_length(self, length: int) -> None:
        """Let every row hold `length` tokens that nobody wrote, to measure what a pass over such a context costs."""
        # the next write makes room for them, filled with zeros
        self.lengths.set([length] * len(self.lengths.host))

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        self.lengths.select_rows(rows)
        for layer in self.layers:
            if isinstance(layer, RaggedLayer):
                layer.store.select_rows(rows)

    def append_rows(self, other: RaggedCache) -> None:
        """Append the rows of another cache of the same model."""
        self.lengths.append_rows(other.lengths)
        for layer, new in zip(self.layers, other.layers, strict=True):
            if isinstance(layer, RaggedLayer) and isinstance(new, RaggedLayer) and layer.is_initialized:
                layer.store.append_rows(new.store)


def _check_attention_kinds(model: PreTrainedModel) -> None:
    kinds = _attention_kinds(model.config.get_text_config(decoder=True))
    implementation = attention_implementation(model)
    remedy = "Generate the rows one by one, unpadded"
    if implementation not in ("eager", "sdpa"):
        remedy += ', or load the target with `attn_implementation="sdpa"`'
    elif kinds <= {"full_attention", "sliding_attention"}:
        return
    raise ValueError(
        "`assistant_model` must be left out for several rows, or padded ones, unless the target has full or "
        f"sliding attention under 'eager' or 'sdpa', got {sorted(kinds) or 'full_attention'} under "
        f"{implementation!r}. {remedy}."
    )


def _attention_kinds(config: PreTrainedConfig) -> set[str]:
    """Return what the layers' masks are made of, beyond full attention where nothing is said."""
    kinds = set(getattr(config, "layer_types", None) or ())
    # GPT-Neo's window, and biases by distance, are counted in columns, which are no positions here
    if "local" in (getattr(config, "attention_layers", None) or ()):
        kinds.add("local")
    if getattr(config, "alibi", False):
        kinds.add("alibi")
    return kinds
