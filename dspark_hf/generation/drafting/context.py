"""What a drafter has read: its context keys and values, and hidden states that wait until it drafts again.

B batch, T tokens, M tapped layers, D hidden, H key/value heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_hf.generation.drafting.interface import DraftContext, DraftedBlock, Sampler
from dspark_hf.generation.fixed_size import FixedSize
from dspark_hf.generation.ragged_store import RaggedLengths, RaggedStore, StaticLengths, StaticStore

# tokens of a row that may wait: reading many at once costs little, keeping them costs memory
_MAX_WAITING = 128


@dataclass
class _Waiting:
    """Passes that read on where the one before ended: hidden states, positions, and tokens that each row keeps."""

    hidden_states: list[Tensor]
    positions: list[Tensor]
    num_tokens: list[int]

    def can_take(self, width: int, num_tokens: Sequence[int]) -> bool:
        """Return whether a pass can follow without a gap: in every row all tokens count, or none of either."""
        length = sum(states.shape[1] for states in self.hidden_states)
        pairs = zip(self.num_tokens, num_tokens, strict=True)
        return all((old, new) in ((length, width), (0, 0)) for old, new in pairs)


class DeferredContext(DraftContext):
    """Hand hidden states to a `DraftContext` only when it is about to draft.

    Rounds without drafts then cost the drafter nothing; what they leave is read in one go.

    Args:
        context: the drafter's context.
    """

    def __init__(self, context: DraftContext):
        self._context = context
        self._waiting: list[_Waiting] = []
        self._num_waiting = 0
        self._has_read = False

    @property
    def is_behind(self) -> bool:
        """Whether more than the last round is waiting: several of them, or the prompts."""
        return not self._has_read or sum(len(one.hidden_states) for one in self._waiting) > 1

    def extend(self, hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int]) -> None:
        """Take a pass's hidden states `(B, T, M * D)` at `positions` `(B, T)`: `num_tokens[r]` of row r."""
        width = hidden_states.shape[1]
        last = self._waiting[-1] if self._waiting else None
        if last is not None and last.can_take(width, num_tokens):
            last.hidden_states.append(hidden_states)
            last.positions.append(positions)
            last.num_tokens = [old + new for old, new in zip(last.num_tokens, num_tokens, strict=True)]
        else:
            self._waiting.append(_Waiting([hidden_states], [positions], list(num_tokens)))
        self._num_waiting += max(num_tokens)
        if self._num_waiting >= _MAX_WAITING:
            self.catch_up()

    def catch_up(self) -> None:
        """Let the drafter read all that waits."""
        for one in self._waiting:
            self._context.extend(torch.cat(one.hidden_states, dim=1), torch.cat(one.positions, dim=1), one.num_tokens)
        self._waiting.clear()
        self._num_waiting = 0
        self._has_read = True

    def draft(self, anchor_ids: Tensor, positions: Tensor, num_drafts: int, sampler: Sampler) -> DraftedBlock:
        """Return `num_drafts` drafts after the anchors `(B)`, once the drafter has read all that waits."""
        self.catch_up()
        return self._context.draft(anchor_ids, positions, num_drafts, sampler)

    @property
    def drafts_trees(self) -> bool:
        """Whether `draft_tree` may be asked for."""
        return self._context.drafts_trees

    def draft_tree(self, anchor_ids: Tensor, positions: Tensor, num_slots: int, num_drafts: int) -> DraftedBlock:
        """Return drafts that branch, once the drafter has read all that waits."""
        self.catch_up()
        return self._context.draft_tree(anchor_ids, positions, num_slots, num_drafts)

    def fix_size(self, size: FixedSize) -> None:
        """Keep all shapes from round to round."""
        self._context.fix_size(size)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        chosen = rows.tolist()
        for one in self._waiting:
            one.hidden_states = [states[rows.to(states.device)] for states in one.hidden_states]
            one.positions = [places[rows.to(places.device)] for places in one.positions]
            one.num_tokens = [one.num_tokens[row] for row in chosen]
        self._context.select_rows(rows)

    def append_rows(self, other: DeferredContext) -> None:
        """Append the rows of another context."""
        self.catch_up()
        other.catch_up()
        self._context.append_rows(other._context)


class ContextCache:
    """The drafter's context keys and values, one store per drafter layer.

    Entries are in slot order; their positions live in the rotated keys, so a row may leave positions out.

    Args:
        num_layers: drafter layers.
        batch_size: rows.
        device: where they live.
        window: latest entries that are of use, or None for all; older ones are forgotten now and then.
    """

    def __init__(self, num_layers: int, batch_size: int, device: torch.device, window: int | None = None):
        self.window = window
        self._num_slots: int | None = None
        self.lengths = RaggedLengths(batch_size, device)
        self.stores: list[RaggedStore] = [RaggedStore() for _ in range(num_layers)]

    def fix_size(self, num_slots: int) -> None:
        """Make room for `num_slots` entries a row once and for all; nothing may have been appended yet."""
        self._num_slots = num_slots
        self.lengths = StaticLengths(len(self.lengths.host), self.lengths.device.device)
        self.stores = [StaticStore(num_slots) for _ in self.stores]

    @property
    def is_made(self) -> bool:
        """Whether the stores have memory."""
        return all(store.keys is not None for store in self.stores)

    def append(self, states: Sequence[tuple[Tensor, Tensor]], num_tokens: Sequence[int]) -> None:
        """Append per-layer keys and values `(B, H, T, E)`, of which row r keeps the first `num_tokens[r]`."""
        self.write(states)
        self.lengthen(num_tokens)

    def write(self, states: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write per-layer keys and values `(B, H, T, E)` behind the entries of every row."""
        for store, (keys, values) in zip(self.stores, states, strict=True):
            store.write(keys, values, self.lengths.host, self.lengths.device)

    def lengthen(self, num_tokens: Sequence[int]) -> None:
        """Keep the first `num_tokens[r]` of what was written last behind the entries of row r."""
        self.lengths.add(num_tokens)
        if self._num_slots is None and self.window is not None and max(self.lengths.host) > 4 * self.window:
            self._forget(self.window)

    def _forget(self, window: int) -> None:
        starts = (self.lengths.device - window).clamp_min(0)
        for store in self.stores:
            store.keep_from(starts, window)
        self.lengths.set([min(length, window) for length in self.lengths.host])

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values `(B, H, longest row, E)` of one layer."""
        return self.stores[layer].read(self._num_seen)

    @property
    def _num_seen(self) -> int:
        return max(self.lengths.host) if self._num_slots is None else self._num_slots

    def mask(self, window: int | None = None) -> Tensor | None:
        """Return which entries a block may see, `(B, 1, longest row)`, or None if all of them.

        `window` is how many of the latest entries that are, where a layer sees fewer than the others.
        """
        window = self.window if window is None else window
        lengths = self.lengths.host
        is_short = window is None or max(lengths) <= window
        if self._num_slots is None and min(lengths) == max(lengths) and is_short:
            return None
        slots = torch.arange(self._num_seen, device=self.lengths.device.device)
        visible = slots < self.lengths.device[:, None]
        if window is not None and (self._num_slots is not None or not is_short):
            visible &= slots >= self.lengths.device[:, None] - window
        return visible[:, None]

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        self.lengths.select_rows(rows)
        for store in self.stores:
            store.select_rows(rows)

    def append_rows(self, other: ContextCache) -> None:
        """Append the rows of another context of the same drafter."""
        self.lengths.append_rows(other.lengths)
        for store, new in zip(self.stores, other.stores, strict=True):
            store.append_rows(new, max(self.lengths.host))
