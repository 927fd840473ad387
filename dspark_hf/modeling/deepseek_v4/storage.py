"""Where a cache keeps vectors: rings of the latest positions, growing lists of compressed entries, and their codecs.

B batch, T tokens, C ring capacity, E entries, c vector size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dspark_hf.modeling.deepseek_v4.formats import FP4_GROUP, decode_fp4, encode_fp4
from dspark_hf.places import put_at, take_at

_GROUP = 64
_LARGEST = 448.0
_SMALLEST_MAXIMUM = 1e-4


@dataclass
class Span:
    """The tokens of one pass: row r's token j stands at position `starts[r] + j` and is real if `j < counts[r]`.

    `starts` and `counts` `(B)` on the device, `num_before` and `num_real` the same on the host, `positions` `(B, T)`.
    """

    starts: Tensor
    counts: Tensor
    num_before: list[int]
    num_real: list[int]
    positions: Tensor

    @property
    def num_tokens(self) -> int:
        """Number T of tokens per row, padding at the end included."""
        return self.positions.shape[1]

    def to(self, device: torch.device) -> Span:
        """Return the span on `device`."""
        if self.positions.device == device:
            return self
        starts, counts, positions = (x.to(device) for x in (self.starts, self.counts, self.positions))
        return Span(starts, counts, self.num_before, self.num_real, positions)


def make_span(num_before: list[int], num_real: list[int], num_tokens: int, device: torch.device) -> Span:
    """Return the span of `num_tokens` tokens behind rows of the given lengths."""
    starts = torch.tensor(num_before, device=device)
    counts = torch.tensor(num_real, device=device)
    positions = starts[:, None] + torch.arange(num_tokens, device=device)
    return Span(starts, counts, list(num_before), list(num_real), positions)


class Codec(Protocol):
    """Turn vectors `(*, c)` into what is stored, several tensors `(*, ?)`, and back."""

    def encode(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """Return what is stored."""
        ...

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """Return the vectors."""
        ...


class PlainCodec:
    """Store vectors in their own dtype."""

    def encode(self, vectors: Tensor) -> tuple[Tensor, ...]:
        return (vectors,)

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        return stored[0]


class _RoundingCodec(Codec):
    """A codec that changes vectors, and can do so to those that are not stored."""

    def round(self, vectors: Tensor) -> Tensor:
        """Return the vectors, in their dtype, as they would come back from storage; the gradient passes unchanged."""
        held = vectors.detach()
        # exact in every dtype: what is rounded lies near or is zero
        return vectors + (self.decode(self.encode(held)).to(vectors.dtype) - held)


class Fp8Codec(_RoundingCodec):
    """Store all but the last `rope_size` dimensions as FP8 (e4m3) with a power of two per 64, as the released code.

    Args:
        rope_size: dimensions at the end that stay as they are.
        dtype: of the decoded vectors.
    """

    def __init__(self, rope_size: int, dtype: torch.dtype):
        self.rope_size = rope_size
        self.dtype = dtype

    def encode(self, vectors: Tensor) -> tuple[Tensor, ...]:
        plain, rope = vectors[..., : -self.rope_size], vectors[..., -self.rope_size :]
        grouped = plain.float().unflatten(-1, (-1, _group_size(plain.shape[-1], _GROUP)))
        maxima = grouped.abs().amax(-1).clamp_min(_SMALLEST_MAXIMUM)
        mantissa, exponent = torch.frexp(maxima / _LARGEST)
        # the smallest power of two that brings the group into range
        exponent = torch.where(mantissa > 0.5, exponent, exponent - 1)
        small = torch.ldexp(grouped, -exponent[..., None]).clamp(-_LARGEST, _LARGEST)
        # bytes: few kernels move FP8 tensors
        codes = small.to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2)
        return codes, (exponent + 127).to(torch.uint8), rope

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        codes, exponents, rope = stored
        values = codes.contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (exponents.shape[-1], -1))
        plain = torch.ldexp(values, exponents[..., None].int() - 127).flatten(-2)
        return torch.cat([plain.to(self.dtype), rope.to(self.dtype)], dim=-1)


class Fp4Codec(_RoundingCodec):
    """Store vectors as FP4 (e2m1), two numbers a byte, with a power of two per 32; they come back in fp32."""

    def encode(self, vectors: Tensor) -> tuple[Tensor, ...]:
        packed, scale = encode_fp4(vectors.unflatten(-1, (-1, _group_size(vectors.shape[-1], FP4_GROUP))))
        # bytes: few kernels move E8M0 tensors
        return packed.flatten(-2), scale.view(torch.uint8)

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        packed, scale = stored
        return decode_fp4(packed.unflatten(-1, (scale.shape[-1], -1)), scale).flatten(-2)


def _group_size(size: int, wanted: int) -> int:
    return wanted if size % wanted == 0 else size


class _Slots:
    """What a codec makes of vectors, in numbered slots of every row; nothing until they are written."""

    def __init__(self, codec: Codec):
        self._codec = codec
        self._stored: tuple[Tensor, ...] | None = None

    def _scatter(self, slots: Tensor, parts: tuple[Tensor, ...]) -> None:
        assert self._stored is not None
        for store, part in zip(self._stored, parts, strict=True):
            put_at(store, slots, part)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch, in that order."""
        if self._stored is not None:
            self._stored = tuple(store[rows.to(store.device)] for store in self._stored)

    def append_rows(self, other: _Slots, num_rows: int, num_new: int) -> None:
        """Append the `num_new` rows of other slots of the same kind to these `num_rows`."""
        # rows that have written nothing yet, or less than others, get empty slots
        own = self._stored or _nothing_like(other._stored, num_rows)
        new = other._stored or _nothing_like(self._stored, num_new)
        if own is not None and new is not None:
            self._stored = tuple(_stacked(*pair) for pair in zip(own, new, strict=True))

    @property
    def num_bytes(self) -> int:
        """Memory in bytes."""
        return 0 if self._stored is None else sum(store.numel() * store.element_size() for store in self._stored)


class Ring(_Slots):
    """The vectors of the latest `capacity` positions of every row; position p lies in slot `p % capacity`."""

    def __init__(self, capacity: int, codec: Codec):
        super().__init__(codec)
        self.capacity = capacity

    def write(self, vectors: Tensor, span: Span) -> None:
        """Keep vectors `(B, T, c)` of a span's real tokens, the latest `capacity` of them."""
        width = min(span.num_tokens, self.capacity)
        if min(span.num_real) == span.num_tokens:
            latest, slots = vectors[:, -width:], span.positions[:, -width:] % self.capacity
        else:
            index = span.counts[:, None] - width + torch.arange(width, device=vectors.device)
            latest = take_at(vectors, index.clamp_min(0))
            # what is no real token goes to a slot that nobody reads
            slots = torch.where(index >= 0, (span.starts[:, None] + index) % self.capacity, self.capacity)
        parts = self._codec.encode(latest.detach())
        if self._stored is None:
            self._stored = tuple(part.new_zeros(len(part), self.capacity + 1, part.shape[2]) for part in parts)
        self._scatter(slots, parts)

    def read(self) -> Tensor | None:
        """Return the vectors `(B, C, c)` in slot order, or None if nothing was written."""
        if self._stored is None:
            return None
        return self._codec.decode(tuple(store[:, : self.capacity] for store in self._stored))

    def positions(self, lengths: Tensor) -> Tensor:
        """Return the position in every slot `(B, C)` for rows of `lengths` `(B)`; negative where there is none."""
        last = lengths[:, None] - 1
        slots = torch.arange(self.capacity, device=lengths.device)
        return last - (last - slots) % self.capacity


class Entries(_Slots):
    """Compressed entries of every row, entry i in slot i.

    What lies behind a row's last complete entry is never read, and written over: so a rollback needs no work.
    """

    def write(self, vectors: Tensor, first: Tensor, needed: int) -> None:
        """Put vectors `(B, N, c)` into the slots from `first` `(B)` on; `needed` is the largest of those plus N."""
        parts = self._codec.encode(vectors.detach())
        if self._stored is None:
            self._stored = tuple(part.new_zeros(len(part), 0, part.shape[2]) for part in parts)
        if needed > self._stored[0].shape[1]:
            # in small steps: at a million tokens, room for twice the entries would be gigabytes
            capacity = needed + max(needed // 128, 16)
            self._stored = tuple(_grown(store, capacity) for store in self._stored)
        slots = first[:, None] + torch.arange(vectors.shape[1], device=first.device)
        self._scatter(slots, parts)

    def read(self, start: int, end: int) -> Tensor:
        """Return the vectors `(B, end - start, c)` of entries `start` to `end - 1`."""
        assert self._stored is not None
        return self._codec.decode(tuple(store[:, start:end] for store in self._stored))

    def gather(self, index: Tensor) -> Tensor:
        """Return the vectors `(B, T, S, c)` of entries `index` `(B, T, S)`."""
        assert self._stored is not None
        rows = torch.arange(len(index), device=index.device)[:, None, None]
        return self._codec.decode(tuple(store[rows, index] for store in self._stored))


def _grown(store: Tensor, capacity: int) -> Tensor:
    larger = store.new_zeros(len(store), capacity, store.shape[2])
    larger[:, : store.shape[1]] = store
    return larger


def _nothing_like(stored: tuple[Tensor, ...] | None, num_rows: int) -> tuple[Tensor, ...] | None:
    return None if stored is None else tuple(part.new_zeros(num_rows, 0, part.shape[2]) for part in stored)


def _stacked(store: Tensor, other: Tensor) -> Tensor:
    capacity = max(store.shape[1], other.shape[1])
    return torch.cat([_grown(part, capacity) if part.shape[1] < capacity else part for part in (store, other)])
