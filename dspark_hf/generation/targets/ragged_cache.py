"""A cache for several rows of different lengths, for any target with ordinary attention.

A row's token at position p lies in slot p; left padding is gone. Each pass writes behind every row's end, and the
attention mask is built from slots and lengths, so a rollback is a change of length. Only of a tree's tokens those that
stay may have to move.

B batch, S columns so far, T tokens, W of a pass, H key/value heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from dspark_hf.generation.compat import (
    attention_implementation,
    empty_cache_like,
    is_placeholder_layer,
)
from dspark_hf.generation.ragged_store import RaggedLengths, RaggedStore, states_at
from dspark_hf.generation.targets.adapter import input_device
from dspark_hf.generation.targets.aligned_cache import counted_columns
from dspark_hf.generation.targets.columns import SlotColumns
from dspark_hf.generation.targets.masks import shown, visible_slots
from dspark_hf.generation.targets.padding import known_positions, pack_order
from dspark_hf.generation.targets.recurrent import RecurrentStates
from dspark_hf.generation.targets.recurrent_support import can_recompute_rows
from dspark_hf.generation.targets.trees import Tree, is_front

PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_STATE_LAYERS = (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)
# kinds of layers with a state, whose masks are about padding alone, and of those that hold nothing
_STATE_KINDS = {"linear_attention", "conv", "hybrid", "moe", "mlp"}


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values, every token kept; windows and chunks live in the mask alone."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, lengths: RaggedLengths):
        self._lengths = lengths
        self.store = RaggedStore()
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """None before the first pass: whoever reads keys by column would take one row's slots for another's.

        Raises:
            ValueError: later on.
        """
        if self.store.keys is None:
            return None
        raise ValueError(
            "`assistant_model` must be left out for several rows, or padded ones, of a target that reads its cache by "
            "itself, got one. Generate the rows one by one, unpadded."
        )

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        # Transformers' layers begin with None
        assert states is None

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


class RaggedHybridLayer(LinearAttentionLayer, RaggedLayer):
    """One layer's keys and values, and beside them a state."""

    is_croppable = True
    is_compileable = False

    def __init__(self, lengths: RaggedLengths, number_of_states: int):
        RaggedLayer.__init__(self, lengths)
        LinearAttentionLayer.__init__(self, number_of_states)


class RaggedCache(Cache):
    """A cache for `model` in which every row has its own length.

    Args:
        model: the target.
        batch_size: number of rows.
        given: the cache that the rows come from, and are returned in; None if they are not.

    Raises:
        ValueError: if a layer of the model is no ordinary or sliding attention, and has no state that can be taken
            back.
    """

    takes_trees = True
    max_rollback = None

    def __init__(self, model: PreTrainedModel, batch_size: int, given: Any = None):
        self._model, self._given = model, given
        self._rows = self._new_lengths(batch_size, input_device(model))
        self._columns: SlotColumns | None = None
        # first: Transformers may not know these kinds of layers either
        _check_attention_kinds(model)
        self._has_chunks = "chunked_attention" in _attention_kinds(model.config.get_text_config(decoder=True))
        template: Any = empty_cache_like(model)
        # of sliding layers, or the chunks that layers see of a text
        self.windows: list[int | None] = []
        layers: list[Any] = []
        for layer in template.layers:
            if type(layer) in _STATE_LAYERS and can_recompute_rows(model):
                is_hybrid = isinstance(layer, CacheLayerMixin)
                layers.append(RaggedHybridLayer(self._rows, layer.number_of_states) if is_hybrid else layer)
                self.windows += [None] if is_hybrid else []
                continue
            if type(layer) not in PLAIN_LAYERS and not is_placeholder_layer(layer):
                raise ValueError(
                    "`assistant_model` must be left out for several rows, or padded ones, of a target whose cache has "
                    f"{type(layer).__name__}, as {type(model).__name__} has. Generate the rows one by one, unpadded."
                )
            self.windows.append(getattr(layer, "sliding_window", None))
            layers.append(layer if is_placeholder_layer(layer) else self._new_layer())
        super().__init__(layers=layers)
        self.states = RecurrentStates(self.layers)
        self.takes_trees = not self.states.layers

    def _new_lengths(self, batch_size: int, device: torch.device) -> RaggedLengths:
        return RaggedLengths(batch_size, device)

    def _new_layer(self) -> RaggedLayer:
        return RaggedLayer(self._rows)

    @property
    def lengths(self) -> list[int]:
        """How many tokens of every row are kept."""
        return self._rows.host

    def adopt(self, mask: Tensor, past_length: int, cache: Any = None) -> None:
        """Take over the tokens of a padded cache of `past_length` columns, by default the one that was given.

        `mask` `(B, S)` marks the columns with a token, those of the prompts included.
        """
        self._columns = SlotColumns(mask.to(self._rows.device.device))
        mask = mask[:, :past_length]
        if past_length == 0:
            return
        order, counts = pack_order(mask)
        sources = (self._given if cache is None else cache).layers
        self.states.copy_from(sources)
        for layer, source in zip(self.layers, sources, strict=True):
            if not isinstance(layer, RaggedLayer) or source.keys is None:
                continue
            # a sliding layer kept its window only; earlier slots are never looked at again
            missing = mask.shape[1] - source.keys.shape[2]
            states = [torch.nn.functional.pad(x, (0, 0, missing, 0)) for x in (source.keys, source.values)]
            keys, values = (states_at(x, order) for x in states)
            layer.store.write(keys, values, self._rows.host, self._rows.device)
            layer.is_initialized = True
        self._rows.set(counts)

    def pretend_length(self, length: int) -> None:
        """Let every row hold `length` tokens that nobody wrote, to measure what a pass over such a context costs."""
        # the next write makes room for them, filled with zeros
        self._rows.set([length] * len(self._rows.host))

    def pass_inputs(
        self, num_tokens: list[int], width: int, device: torch.device, tree: Tree | None, *, are_drafts: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the positions `(B, W)` of a pass, and the model's positions and masks."""
        steps = torch.arange(width, device=device) if tree is None else torch.tensor(tree.depths, device=device)
        positions = self._rows.device[:, None] + steps
        config, num_real = self._model.config.get_text_config(decoder=True), [1] * len(num_tokens)
        known = known_positions(config, self._rows.host, positions, num_real if are_drafts else num_tokens)
        return positions, {"position_ids": known, "attention_mask": self._masks(positions, tree)}

    def _masks(self, positions: Tensor, tree: Tree | None) -> Any:
        near = "chunked_attention" if self._has_chunks else "sliding_attention"
        kinds = {near if window else "full_attention": window for window in self.windows}
        masks: dict[str, Any] = {kind: self._mask(positions, window, tree) for kind, window in kinds.items()}
        if self.states.layers:
            # no draft is padding; a model of states alone takes no other mask than one of padding
            return {"full_attention": None, "linear_attention": None, "conv": None, **masks} if masks else None
        # a model with one kind of layer takes one mask, a hybrid one a mask per kind
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, positions: Tensor, window: int | None, tree: Tree | None) -> Tensor:
        num_slots = self._num_seen(positions.shape[1])
        columns = self._columns if self._columns is not None and self._columns.have_holes else None
        size = {"chunk" if self._has_chunks else "window": window}
        visible = visible_slots(positions, self._rows.device, num_slots, **size, tree=tree, columns=columns)
        return shown(visible, self._model)

    def _num_seen(self, width: int) -> int:
        """Return how many slots a pass over `width` tokens a row looks at."""
        return max(self._rows.host) + width

    def keep(self, starts: Sequence[int], kept: Sequence[Sequence[int]]) -> None:
        """Lengthen every row by its kept tokens, which close up where others lie between them."""
        self.states.keep([len(row) for row in kept])
        if not all(is_front(row) for row in kept):
            self._close_up(kept)
        self._rows.set([start + len(row) for start, row in zip(starts, kept, strict=True)])

    def _close_up(self, kept: Sequence[Sequence[int]]) -> None:
        count = max(len(row) for row in kept)
        # a row that keeps fewer moves nothing behind them
        tokens = torch.tensor([[*row, *range(len(row), count)] for row in kept], device=self._rows.device.device)
        for layer in self.layers:
            if isinstance(layer, RaggedLayer):
                layer.store.close_up(self._rows.device, tokens)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        self._rows.select_rows(rows)
        self.states.select_rows(rows)
        if self._columns is not None:
            self._columns.select_rows(rows)
        for layer in self.layers:
            if isinstance(layer, RaggedLayer):
                layer.store.select_rows(rows)

    def append_rows(self, other: RaggedCache) -> None:
        """Append the rows of another cache of the same model."""
        self._rows.append_rows(other._rows)
        self.states.append_rows(other.states)
        if self._columns is not None and other._columns is not None:
            self._columns.append_rows(other._columns)
        for layer, new in zip(self.layers, other.layers, strict=True):
            if isinstance(layer, RaggedLayer) and isinstance(new, RaggedLayer) and layer.is_initialized:
                layer.store.append_rows(new.store, max(self._rows.host))

    def returned(self, num_padded: Sequence[int]) -> Any:
        """Return the given cache, filled with every row's tokens in their columns, zeros between them."""
        padded = empty_cache_like(self._model)
        RecurrentStates(padded.layers).copy_from(self.layers)
        self._fill(padded)
        self._given.layers = padded.layers
        return self._given

    def _fill(self, cache: Cache) -> None:
        """Put every row's tokens into an empty padded cache."""
        lengths = self._rows.host
        assert self._columns is not None
        slots = torch.arange(max(lengths), device=self._rows.device.device).expand(len(lengths), -1)
        columns = self._columns.of(slots)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, RaggedLayer) and layer.store.keys is not None and layer.store.values is not None:
                keys = _padded(layer.store.keys, columns, lengths)
                values = _padded(layer.store.values, columns, lengths)
                cache.update(keys, values, index)

    def release(self, starts: Sequence[int] | None, num_padded: Sequence[int]) -> None:
        """Nothing: a cache of the user's is filled only when it is returned."""


def _padded(states: Tensor, columns: Tensor, lengths: Sequence[int]) -> Tensor:
    columns = columns.to(states.device)
    width = max(int(columns[row, length - 1]) + 1 for row, length in enumerate(lengths))
    padded = states.new_zeros(states.shape[0], states.shape[1], width, states.shape[3])
    for row, length in enumerate(lengths):
        padded[row, :, columns[row, :length]] = states[row, :, :length]
    return padded


def has_plain_attention(model: PreTrainedModel) -> bool:
    """Return whether all layers have full or sliding attention under an implementation that takes any mask."""
    kinds = _attention_kinds(model.config.get_text_config(decoder=True))
    return kinds <= {"full_attention", "sliding_attention"} and attention_implementation(model) in ("eager", "sdpa")


def _check_attention_kinds(model: PreTrainedModel) -> None:
    kinds = _attention_kinds(model.config.get_text_config(decoder=True))
    if can_recompute_rows(model):
        kinds -= _STATE_KINDS
    implementation = attention_implementation(model)
    remedy = "Generate the rows one by one, unpadded"
    if implementation not in ("eager", "sdpa"):
        remedy += ', or load the target with `attn_implementation="sdpa"`'
    elif kinds <= {"full_attention", "sliding_attention"} or kinds <= {"full_attention", "chunked_attention"}:
        return
    raise ValueError(
        "`assistant_model` must be left out for several rows, or padded ones, unless the target has full, sliding or "
        f"chunked attention under 'eager' or 'sdpa', got {sorted(kinds) or 'full_attention'} under "
        f"{implementation!r}. {remedy}."
    )


def _attention_kinds(config: PreTrainedConfig) -> set[str]:
    """Return what the layers' masks are made of, beyond full attention where nothing is said."""
    # columns are no positions here
    kinds = set(getattr(config, "layer_types", None) or ()) | counted_columns(config)
    # these read or copy layers of the cache themselves, past the layers' own methods
    if getattr(config, "cross_attention_layers", None):
        kinds.add("cross_attention")
    if getattr(config, "n_recurrent_loops", None):
        kinds.add("recurrent_loops")
    # transformers 5.24: plain `generate` shows GIT its padding where there is no image
    if config.model_type == "git":
        kinds.add("image_prefix")
    return kinds
