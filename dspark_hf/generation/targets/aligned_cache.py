"""A cache for several rows of a target that counts columns: its rows end in the same one, padding lies before them.

Biases by distance (ALiBi) and windows that a model counts by itself hold there as they do in plain `generate`, whose
layout it is. After a pass of which rows keep different numbers of tokens, those that keep fewer move up.

B batch, S columns, W tokens of a pass, H key/value heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dspark_hf.generation.compat import empty_cache_like
from dspark_hf.generation.ragged_store import states_at
from dspark_hf.generation.targets.adapter import input_device
from dspark_hf.generation.targets.padding import known_positions
from dspark_hf.generation.targets.recurrent import RecurrentStates
from dspark_hf.generation.targets.trees import Tree

# kinds of attention that count columns, and families that always have a bias
_KINDS = {"alibi", "local"}
_BIASED = ("bloom", "mpt")


def counted_columns(config: PreTrainedConfig) -> set[str]:
    """Return which kinds of attention of a text decoder count columns: `"alibi"`, and GPT-Neo's `"local"` windows."""
    kinds = set(getattr(config, "attention_layers", None) or ()) & _KINDS
    if config.model_type in _BIASED or getattr(config, "alibi", False):
        kinds.add("alibi")
    return kinds


def counts_columns(model: PreTrainedModel) -> bool:
    """Return whether a target's layers count the columns of their cache, and nothing but the distance between them."""
    config = model.config.get_text_config(decoder=True)
    return bool(counted_columns(config)) and all(
        type(layer) is DynamicLayer for layer in empty_cache_like(model).layers
    )


class AlignedCache(DynamicCache):
    """A cache for `model` in which every row has its own length, and all end in the last column.

    Args:
        model: the target.
        batch_size: number of rows.
        given: the cache that the rows come from, and are returned in; None if they are not.
    """

    takes_trees = False
    max_rollback = None

    def __init__(self, model: PreTrainedModel, batch_size: int, given: Any = None):
        super().__init__(config=model.config.get_text_config(decoder=True))
        self._config, self._given = model.config.get_text_config(decoder=True), given
        # which columns hold a token
        self._mask = torch.zeros(batch_size, 0, dtype=torch.bool, device=input_device(model))
        self.windows: list[int | None] = [None] * len(self.layers)
        self.states = RecurrentStates([])
        # of every row the tokens, and the columns from its first one on
        self._lengths, self._spans = [0] * batch_size, [0] * batch_size

    @property
    def lengths(self) -> list[int]:
        """How many tokens of every row are kept."""
        return self._lengths

    def adopt(self, mask: Tensor, past_length: int, cache: Any = None) -> None:
        """Take over the `past_length` columns of a padded cache, of which `mask` `(B, S)` marks those with a token."""
        self.layers = (self._given if cache is None else cache).layers
        self._mask = mask[:, :past_length]
        self._lengths = self._mask.sum(-1).tolist()
        self._spans = (past_length - self._mask.long().argmax(-1)).tolist()

    @property
    def _filled(self) -> list[Any]:
        """The layers that hold something."""
        layers: list[Any] = self.layers
        return [layer for layer in layers if layer.keys is not None]

    def pretend_length(self, length: int) -> None:
        """Let every row of a filled cache hold `length` tokens, to measure what a pass over such a context costs."""
        for layer in self._filled:
            layer.keys, layer.values = (_widened(x, length) for x in (layer.keys, layer.values))
        self._mask = self._mask.new_ones(len(self._mask), length)
        self._lengths, self._spans = [length] * len(self._mask), [length] * len(self._mask)

    def pass_inputs(
        self, num_tokens: list[int], width: int, device: torch.device, tree: Tree | None, *, are_drafts: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the positions `(B, W)` of a pass, and the model's positions and the mask of its columns."""
        positions = torch.tensor(self._lengths, device=device)[:, None] + torch.arange(width, device=device)
        num_real = [1] * len(num_tokens) if are_drafts else num_tokens
        known = known_positions(self._config, self._lengths, positions, num_real)
        # what is no token stands behind the others, which do not see it
        mask = functional.pad(self._mask, (0, width), value=True)
        return positions, {"position_ids": known, "attention_mask": mask.long()}

    def keep(self, starts: Sequence[int], kept: Sequence[Sequence[int]]) -> None:
        """Let every row end behind its kept tokens, which are the first of the pass."""
        counts, most = [len(row) for row in kept], max(len(row) for row in kept)
        width, device = self._mask.shape[1] + most, self._mask.device
        shifts = torch.tensor([most - count for count in counts], device=device)[:, None]
        sources = torch.arange(width, device=device) - shifts
        mask = functional.pad(self._mask, (0, most), value=True).gather(1, sources.clamp_min(0)) & (sources >= 0)
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        self._spans = [span + count for span, count in zip(self._spans, counts, strict=True)]
        # columns before it are padding in every row
        first = width - max(self._spans)
        is_moved = min(counts) < most
        for layer in self._filled:
            layer.keys, layer.values = (
                (_moved(x, sources) if is_moved else x)[:, :, first:width] for x in (layer.keys, layer.values)
            )
        self._mask = mask[:, first:]

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        self._mask = self._mask[rows]
        self._lengths, self._spans = (
            [values[row] for row in rows.tolist()] for values in (self._lengths, self._spans)
        )
        for layer in self._filled:
            layer.keys, layer.values = (x[rows.to(x.device)] for x in (layer.keys, layer.values))

    def append_rows(self, other: AlignedCache) -> None:
        """Append the rows of another cache of the same model."""
        width = max(self._mask.shape[1], other._mask.shape[1])
        self._mask = torch.cat([functional.pad(x._mask, (width - x._mask.shape[1], 0)) for x in (self, other)])
        self._lengths, self._spans = self._lengths + other._lengths, self._spans + other._spans
        for layer, new in zip(self._filled, other._filled, strict=True):
            layer.keys, layer.values = (
                torch.cat([_widened(x, width), _widened(y, width)])
                for x, y in ((layer.keys, new.keys), (layer.values, new.values))
            )

    def returned(self, num_padded: Sequence[int]) -> Any:
        """Return the given cache, filled with every row's tokens in their columns, zeros between them."""
        width = num_padded[0] + self._lengths[0]
        mask = functional.pad(self._mask, (width - self._mask.shape[1], 0))[:, None, :, None]
        for layer in self._filled:
            layer.keys, layer.values = (
                _widened(x, width).masked_fill(~mask.to(x.device), 0) for x in (layer.keys, layer.values)
            )
        self._given.layers = self.layers
        return self._given

    def release(self, starts: Sequence[int] | None, num_padded: Sequence[int]) -> None:
        """Nothing: a cache of the user's is filled only when it is returned."""


def _moved(states: Tensor, sources: Tensor) -> Tensor:
    """Return `states` `(B, H, *, E)` from the columns `sources` `(B, S)`, whatever where these are negative."""
    return states_at(states, sources.to(states.device).clamp_min(0))


def _widened(states: Tensor, width: int) -> Tensor:
    """Return `states` `(B, H, S, E)` with zeros before them, `width` columns in all."""
    return functional.pad(states, (0, 0, width - states.shape[2], 0))
