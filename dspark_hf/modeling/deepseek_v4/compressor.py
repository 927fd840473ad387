"""Compressed key/value entries: one vector for every `ratio` tokens (CSA and HCA).

B batch, T tokens, N new entries, E all, K chosen, r ratio, c vector size, S series (2 where windows overlap).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dspark_hf.modeling.backbone import RMSNorm
from dspark_hf.modeling.deepseek_v4.cache import CompressedStore
from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.deepseek_v4.rotary import rotary_tables, rotate
from dspark_hf.modeling.deepseek_v4.storage import Span
from dspark_hf.places import put_at, take_at


class EntriesSoFar:
    """The compressed entries of a text up to the present pass: in the cache or, without one, as just made.

    What a cache holds has no gradient; where the pass's own entries have one, they stand in place of their copies.

    Args:
        new: the pass's own `(B, N, c)`.
        first: number of every row's first new entry `(B)`.
        num_entries: how many the longest row has.
        store: where all of them are.
    """

    def __init__(self, new: Tensor, first: Tensor, num_entries: int, store: CompressedStore | None):
        self._store = store
        self._held = new
        self.num_entries = num_entries
        if store is not None and new.shape[1] > 0 and new.requires_grad:
            slots = first[:, None] + torch.arange(new.shape[1], device=new.device)
            self._held = store.entries.read(0, num_entries).to(new.dtype, copy=True)
            put_at(self._held, slots, new)
            self._store = None

    def all(self) -> Tensor:
        """Return all entries `(B, E, c)`."""
        return self._held if self._store is None else self._store.entries.read(0, self.num_entries)

    def read(self, start: int, end: int) -> Tensor:
        """Return entries `start` to `end - 1`, `(B, end - start, c)`."""
        return self._held[:, start:end] if self._store is None else self._store.entries.read(start, end)

    def gather(self, index: Tensor) -> Tensor:
        """Return entries `(B, T, K, c)` by number `(B, T, K)`."""
        if self._store is not None:
            return self._store.entries.gather(index)
        rows = torch.arange(len(index), device=index.device)[:, None, None]
        return self._held[rows, index]


class Compressor(nn.Module):
    """Make compressed entries, in fp32.

    Entry i is the mean of its window's vectors, weighted per dimension by a softmax over the window. Where windows
    overlap (CSA), a second series of vectors comes from the window before.

    Args:
        config: the model's configuration.
        ratio: tokens per entry.
        size: size c of an entry.
        is_overlapping: whether an entry also draws on the window before its own.
        rounding: what becomes of entries `(B, N, c)`, as if they came from a cache that stores them so; None: nothing.
    """

    def __init__(
        self,
        config: DeepseekV4DSparkConfig,
        *,
        ratio: int,
        size: int,
        is_overlapping: bool,
        rounding: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.config = config
        self.ratio = ratio
        self.size = size
        self.num_series = 2 if is_overlapping else 1
        self.wkv = nn.Linear(config.hidden_size, self.num_series * size, bias=False)
        self.wgate = nn.Linear(config.hidden_size, self.num_series * size, bias=False)
        self.ape = nn.Parameter(torch.zeros(ratio, self.num_series * size, dtype=torch.float32))
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self._rounding = rounding

    def forward(self, hidden_states: Tensor, span: Span, store: CompressedStore | None) -> EntriesSoFar:
        """Return the entries so far, those that the span completes included, in the dtype of `hidden_states`.

        Takes `hidden_states` `(B, T, D)`; keeps in `store`, if there is one, new entries and what later ones need.
        Rows that complete fewer than others hold numbers there that nobody sees.
        """
        first = span.starts // self.ratio
        firsts = [before // self.ratio for before in span.num_before]
        ends = [(before + real) // self.ratio for before, real in zip(span.num_before, span.num_real, strict=True)]
        num_new = max(end - begin for begin, end in zip(firsts, ends, strict=True))
        states = hidden_states.float()
        gates = self.wgate(states) + self.ape[span.positions % self.ratio]
        tokens = torch.cat([self.wkv(states), gates], dim=-1)  # [B, T, 2 * S * c]
        entries = hidden_states.new_zeros(len(hidden_states), 0, self.size)
        if num_new > 0:
            entries = self._compress(tokens, span, store, first, num_new).to(hidden_states.dtype)
        if self._rounding is not None:
            entries = self._rounding(entries)
        num_entries = max(firsts) + num_new
        if store is not None:
            store.tail.write(tokens, span)
            if num_new > 0:
                store.entries.write(entries, first, num_entries)
        return EntriesSoFar(entries, first, num_entries, store)

    def _compress(
        self, tokens: Tensor, span: Span, store: CompressedStore | None, first: Tensor, num_new: int
    ) -> Tensor:
        ratio, size = self.ratio, self.size
        numbers = first[:, None] + torch.arange(num_new, device=first.device)  # [B, N]
        # one window more at the start where windows overlap
        start = (first - (self.num_series - 1)) * ratio
        positions = start[:, None] + torch.arange((num_new + self.num_series - 1) * ratio, device=first.device)
        windows = _tokens_at(positions, tokens, span, store).unflatten(1, (-1, ratio))
        vectors, gates = windows.unflatten(-1, (2, self.num_series, size)).unbind(-3)  # [B, N (+ 1), r, S, c]
        if self.num_series == 1:
            vectors, gates = vectors[..., 0, :], gates[..., 0, :]
        else:
            # the first series of the window before, the second of the own one
            is_missing = (numbers == 0)[..., None, None]
            before = gates[:, :-1, :, 0].masked_fill(is_missing, float("-inf"))
            gates = torch.cat([before, gates[:, 1:, :, 1]], dim=2)
            vectors = torch.cat([vectors[:, :-1, :, 0], vectors[:, 1:, :, 1]], dim=2)
        entries = self.norm((gates.softmax(dim=2) * vectors).sum(dim=2))
        return rotate(entries, rotary_tables(self.config, numbers * ratio, is_compressed=True))


def _tokens_at(positions: Tensor, tokens: Tensor, span: Span, store: CompressedStore | None) -> Tensor:
    """Return the vectors `(B, P, *)` at `positions` `(B, P)`, from the span's `tokens` or from what is remembered."""
    remembered = None if store is None else store.tail.read()
    offset = positions - span.starts[:, None]
    # a row that completes fewer entries, and the window before the first, look outside
    inside = offset.clamp(0, span.num_tokens - 1)
    if remembered is None or max(span.num_before) == 0:
        return take_at(tokens, inside)
    assert store is not None
    index = torch.where(offset < 0, positions % store.tail.capacity, store.tail.capacity + inside)
    return take_at(torch.cat([remembered, tokens], dim=1), index)
