"""Which column of the batch a row's token stands in, where padding lies between tokens and not before them alone.

A position counts the tokens of a row; a sliding window, and a cache that is handed back, count columns.

B batch, S columns, N slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_hf.generation.targets.padding import pack_order


class SlotColumns:
    """The columns of slots: those that a mask gave, and behind them one for each further token.

    Args:
        mask: `(B, S)`, which columns hold a token; the token at position p of a row lies in slot p.
    """

    def __init__(self, mask: Tensor):
        self._given, counts = pack_order(mask)
        self._counts = torch.tensor(counts, device=mask.device)[:, None]
        self._shifts = mask.shape[1] - self._counts
        slots = torch.arange(self._given.shape[1], device=mask.device)
        is_shifted = (self._given == slots + self._shifts) | (slots >= self._counts)
        self.have_holes = not bool(is_shifted.all())

    def of(self, slots: Tensor) -> Tensor:
        """Return the columns `(B, *)` of `slots` `(B, *)`."""
        index = slots.flatten(1).clamp(max=self._given.shape[1] - 1)
        given = self._given.gather(1, index).view_as(slots)
        ones = [1] * (slots.ndim - 2)
        counts, shifts = self._counts.view(-1, 1, *ones), self._shifts.view(-1, 1, *ones)
        return torch.where(slots < counts, given, slots + shifts)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        self._given, self._counts, self._shifts = self._given[rows], self._counts[rows], self._shifts[rows]

    def append_rows(self, other: SlotColumns) -> None:
        """Append the rows of other columns."""
        width = max(self._given.shape[1], other._given.shape[1])
        given = [torch.nn.functional.pad(one._given, (0, width - one._given.shape[1])) for one in (self, other)]
        self._given = torch.cat(given)
        self._counts = torch.cat([self._counts, other._counts])
        self._shifts = torch.cat([self._shifts, other._shifts])
        self.have_holes = self.have_holes or other.have_holes
