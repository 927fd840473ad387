"""Keys and values of rows that have their own lengths: what the drafter's context and the target's cache are made of.

B batch, T tokens, C capacity, H key/value heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_hf.places import put_at, take_at


class RaggedStore:
    """Keys and values of one layer, `(B, H, C, E)`; row r's token j lies in slot j.

    Writing past a row's length is harmless: what lies there is masked and written over. So a rollback is nothing but
    a smaller length.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        # what keys and values are the first rows of, since rows left
        self._larger: tuple[Tensor, Tensor] | None = None

    def write(self, keys: Tensor, values: Tensor, starts: Sequence[int], starts_tensor: Tensor) -> None:
        """Write keys and values `(B, H, T, E)` into the slots from `starts[r]` on."""
        num_tokens = keys.shape[2]
        end = max(starts) + num_tokens
        if self.keys is None or self.values is None:
            self.keys, self.values = _reserve(keys, end), _reserve(values, end)
        elif end > self.keys.shape[2]:
            self.keys, self.values, self._larger = _grow(self.keys, end), _grow(self.values, end), None
        if min(starts) == max(starts):
            self.keys[:, :, starts[0] : end] = keys
            self.values[:, :, starts[0] : end] = values
            return
        slots = starts_tensor[:, None] + torch.arange(num_tokens, device=keys.device)
        _put(self.keys, slots, keys)
        _put(self.values, slots, values)

    def read(self, length: int) -> tuple[Tensor, Tensor]:
        """Return keys and values `(B, H, length, E)`."""
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, :length], self.values[:, :, :length]

    def keep_from(self, starts: Tensor, length: int) -> None:
        """Move the `length` slots from `starts` `(B)` on to the front, and drop the others."""
        if self.keys is not None and self.values is not None:
            slots = starts[:, None] + torch.arange(length, device=starts.device)
            self.keys, self.values, self._larger = states_at(self.keys, slots), states_at(self.values, slots), None

    def close_up(self, starts: Tensor, tokens: Tensor) -> None:
        """Move what lies `tokens[r]` slots behind `starts[r]`, `(B, N)` and `(B)`, to the N slots from there on."""
        if self.keys is not None and self.values is not None:
            starts, tokens = starts.to(self.keys.device)[:, None], tokens.to(self.keys.device)
            slots = starts + torch.arange(tokens.shape[1], device=starts.device)
            for store in (self.keys, self.values):
                _put(store, slots, states_at(store, starts + tokens))

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        if self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            before = self.keys, self.values
            if self._larger is None or not _begins(self._larger[0], self.keys):
                self._larger = before
            self.keys, self.values = (_selected(store, rows) for store in before)
            self._let_go()

    def append_rows(self, other: RaggedStore, length: int) -> None:
        """Append the rows of another store of the same layer, of all of which the longest has `length` tokens."""
        assert self.keys is not None and self.values is not None
        assert other.keys is not None and other.values is not None
        larger = self._larger or (self.keys, self.values)
        self.keys = _appended(self.keys, larger[0], other.keys, length)
        self.values = _appended(self.values, larger[1], other.values, length)
        self._let_go()

    def _let_go(self) -> None:
        """Free a larger store that rows were copied out of."""
        if self._larger is not None and self.keys is not None and not _begins(self._larger[0], self.keys):
            self._larger = None


class StaticStore(RaggedStore):
    """Keys and values of one layer that are made at the first write and never again, so that passes can be compiled.

    Args:
        num_slots: slots C of a row.
    """

    def __init__(self, num_slots: int):
        super().__init__()
        self.num_slots = num_slots

    def write(self, keys: Tensor, values: Tensor, starts: Sequence[int], starts_tensor: Tensor) -> None:
        """Write keys and values `(B, H, T, E)` into the slots from `starts_tensor[r]` on; the host's are not read."""
        if self.keys is None or self.values is None:
            self.make(keys, values)
        assert self.keys is not None and self.values is not None
        slots = starts_tensor.to(keys.device)[:, None] + torch.arange(keys.shape[2], device=keys.device)
        _put(self.keys, slots, keys)
        _put(self.values, slots, values)

    def make(self, keys: Tensor, values: Tensor) -> None:
        """Make room for all slots, like `keys` and `values` `(B, H, T, E)`."""
        # zeros, since a masked slot still enters a product and must not be NaN
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.num_slots, states.shape[3]) for states in (keys, values)
        )
        for stored in (self.keys, self.values):
            # a graph that is replayed then writes in place
            torch._dynamo.mark_static_address(stored)

    def read(self, length: int) -> tuple[Tensor, Tensor]:
        """Return keys and values `(B, H, length, E)`."""
        if length == self.num_slots and self.keys is not None and self.values is not None:
            # the very tensors, whose place is known
            return self.keys, self.values
        return super().read(length)


def _put(store: Tensor, slots: Tensor, states: Tensor) -> None:
    """Write states `(B, H, T, E)` into the slots `(B, T)` of a store."""
    put_at(store.transpose(1, 2), slots, states.transpose(1, 2))


def states_at(store: Tensor, slots: Tensor) -> Tensor:
    """Return the states `(B, H, T, E)` in the slots `(B, T)` of a store."""
    return take_at(store.transpose(1, 2), slots).transpose(1, 2).contiguous()


def _reserve(states: Tensor, length: int) -> Tensor:
    # zeros, since a masked slot still enters a product and must not be NaN
    return states.new_zeros(states.shape[0], states.shape[1], _with_room(length), states.shape[3])


def _with_room(length: int) -> int:
    """Return the capacity of a store that is made for `length` tokens a row."""
    return 64 * (length // 64 + 2)


def _selected(store: Tensor, rows: Tensor) -> Tensor:
    count = len(rows)
    moved = (rows != torch.arange(count, device=rows.device)).nonzero()[:, 0]
    if count > len(store) or bool((rows[moved] < count).any()):
        return store[rows]
    # rows from the end fill gaps: the others, which may be long, stay where they are
    store[moved] = store[rows[moved]]
    return store[:count]


def _begins(larger: Tensor, store: Tensor) -> bool:
    """Return whether a store is the first rows of a larger one, in the same memory."""
    return larger.data_ptr() == store.data_ptr() and larger.shape[1:] == store.shape[1:] and len(larger) >= len(store)


def _appended(store: Tensor, larger: Tensor, other: Tensor, length: int) -> Tensor:
    """Return the rows of a store and of another: where others left, in their place, else in a new one."""
    count = len(store) + len(other)
    # what a longer row left behind that is gone by now need not stay
    is_large_enough = count <= len(larger) and length <= larger.shape[2] <= 2 * _with_room(length)
    if not is_large_enough or not _begins(larger, store):
        return _stacked(store, other, length)
    kept = other[:, :, :length]
    larger[len(store) : count, :, : kept.shape[2]] = kept
    return larger[:count]


def _stacked(store: Tensor, other: Tensor, length: int) -> Tensor:
    stacked = store.new_zeros(len(store) + len(other), store.shape[1], _with_room(length), store.shape[3])
    for part, states in ((stacked[: len(store)], store), (stacked[len(store) :], other)):
        kept = states[:, :, :length]
        part[:, :, : kept.shape[2]] = kept
    return stacked


def _grow(store: Tensor, length: int) -> Tensor:
    larger = store.new_zeros(store.shape[0], store.shape[1], max(length, 2 * store.shape[2]), store.shape[3])
    larger[:, :, : store.shape[2]] = store
    return larger


class RaggedLengths:
    """Lengths of the rows of a ragged cache, on the host and on the device."""

    def __init__(self, batch_size: int, device: torch.device):
        self.host = [0] * batch_size
        self.device = torch.zeros(batch_size, dtype=torch.long, device=device)

    def set(self, lengths: Sequence[int]) -> None:
        """Set every row's length."""
        self.host = list(lengths)
        self.device = torch.tensor(self.host, dtype=torch.long, device=self.device.device)

    def add(self, counts: Sequence[int]) -> None:
        """Lengthen every row."""
        self.set([length + count for length, count in zip(self.host, counts, strict=True)])

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        self.set([self.host[row] for row in rows.tolist()])

    def append_rows(self, other: RaggedLengths) -> None:
        """Append the rows of other lengths."""
        self.set(self.host + other.host)


class StaticLengths(RaggedLengths):
    """Lengths of rows, whose tensor stays where it is: a compiled pass reads it."""

    def set(self, lengths: Sequence[int]) -> None:
        """Set every row's length."""
        self.host = list(lengths)
        self.device.copy_(torch.tensor(self.host, dtype=torch.long))


def fill_gaps(live: Sequence[int]) -> list[int]:
    """Return the indices of `live` rows, the last ones put where rows before them left gaps: others need not move."""
    staying = {index for index in live if index < len(live)}
    moving = [index for index in live if index >= len(live)]
    return [index if index in staying else moving.pop(0) for index in range(len(live))]
