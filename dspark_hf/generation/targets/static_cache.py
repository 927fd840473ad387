"""A ragged cache of one size from start to end, so that passes over it can be compiled.

B batch, T tokens of a pass, C slots, H key/value heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dspark_hf.generation.ragged_store import RaggedLengths, StaticLengths, StaticStore
from dspark_hf.generation.targets.ragged_cache import RaggedCache, RaggedLayer
from dspark_hf.generation.targets.trees import Tree


class StaticLayer(RaggedLayer):
    """One layer's keys and values `(B, H, C, E)`, made at the first pass and never again.

    Args:
        lengths: how many tokens of every row are kept.
        num_slots: slots C of a row.
    """

    is_compileable = True
    store: StaticStore

    def __init__(self, lengths: RaggedLengths, num_slots: int):
        super().__init__(lengths)
        self.store = StaticStore(num_slots)
        # how many slots the next pass looks at
        self.num_visible = num_slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `(B, H, T, E)` behind every row's end and return the slots that the pass looks at."""
        self.is_initialized = True
        self.store.write(key_states, value_states, (), self._lengths.device)
        return self.store.read(self.num_visible)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many slots a pass sees, and the first."""
        return self.num_visible, 0

    def get_seq_length(self) -> Any:
        """Return the longest row's length, on the device."""
        return self._lengths.device.max()

    def get_max_length(self) -> int:
        """Return the number of slots."""
        return self.store.num_slots

    get_max_cache_shape = get_max_length


class StaticRaggedCache(RaggedCache):
    """A cache for `model` in which every row has its own length and the same room.

    Sliding layers keep every token, too: what lies before the window is taken back with the drafts behind it.

    Args:
        model: the target.
        batch_size: number of rows, which stays.
        given: the static cache that `generate` prepared, filled when it is returned.
        num_slots: room of a row, in tokens.
        sees_all: whether drafts look at all slots, those without a token masked, so that shapes stay.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, given: Any, *, num_slots: int, sees_all: bool):
        self._num_slots, self._sees_all = num_slots, sees_all
        self._num_visible = num_slots
        super().__init__(model, batch_size, given)

    def _new_lengths(self, batch_size: int, device: torch.device) -> RaggedLengths:
        return StaticLengths(batch_size, device)

    def _new_layer(self) -> StaticLayer:
        return StaticLayer(self._rows, self._num_slots)

    @property
    def _static_layers(self) -> list[StaticLayer]:
        return [layer for layer in self.layers if isinstance(layer, StaticLayer)]

    def pass_inputs(
        self, num_tokens: list[int], width: int, device: torch.device, tree: Tree | None, *, are_drafts: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the positions `(B, W)` of a pass, and the model's positions and masks."""
        # a prompt is not compiled, and would pay for every empty slot
        is_whole = are_drafts and self._sees_all
        self._num_visible = self._num_slots if is_whole else max(self._rows.host) + width
        for layer in self._static_layers:
            layer.num_visible = self._num_visible
        return super().pass_inputs(num_tokens, width, device, tree, are_drafts=are_drafts)

    def _num_seen(self, width: int) -> int:
        return self._num_visible

    def select_rows(self, rows: Tensor) -> None:
        """Raise: all rows stay to the end."""
        raise RuntimeError("`rows` of a static cache must stay, got others to keep. This is a fault of dspark_hf.")

    def append_rows(self, other: RaggedCache) -> None:
        """Raise: rows that come would need another size."""
        raise RuntimeError("`rows` of a static cache must stay, got others to append. This is a fault of dspark_hf.")

    def returned(self, num_padded: Sequence[int]) -> Any:
        """Return the given cache, filled with every row's tokens in their columns, zeros between them."""
        self._fill(self._given)
        return self._given
