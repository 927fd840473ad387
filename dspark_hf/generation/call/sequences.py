"""Committed tokens of a batch whose rows grow at their own pace.

B batch, P prompt width, A tokens ahead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Sequences:
    """Token ids laid out as plain `generate` lays them out: left-padded prompts, then each row's own tokens.

    Args:
        input_ids: the prompts `(B, P)`.
        pad_token_id: what fills the end of short rows.
    """

    def __init__(self, input_ids: Tensor, pad_token_id: int):
        self.prompt_length = input_ids.shape[1]
        self.pad_token_id = pad_token_id
        self.lengths = [self.prompt_length] * len(input_ids)
        # new tokens are int64, and plain `generate` appends them to the prompts
        self._ids = input_ids.to(torch.promote_types(input_ids.dtype, torch.long), copy=True)

    @property
    def batch_size(self) -> int:
        """Number of rows, finished ones included."""
        return len(self._ids)

    @property
    def device(self) -> torch.device:
        """Where the ids live."""
        return self._ids.device

    def append(self, row: int, token_ids: Tensor) -> None:
        """Append `token_ids` `(n,)` to one row."""
        start, end = self.lengths[row], self.lengths[row] + len(token_ids)
        if end > self._ids.shape[1]:
            room = self._ids.new_full((self.batch_size, max(end, 2 * self._ids.shape[1], 64)), self.pad_token_id)
            room[:, : self._ids.shape[1]] = self._ids
            self._ids = room
        self._ids[row, start:end] = token_ids
        self.lengths[row] = end

    def cut(self, row: int, length: int) -> None:
        """Shorten one row."""
        self._ids[row, length : self.lengths[row]] = self.pad_token_id
        self.lengths[row] = length

    def last_tokens(self, rows: Sequence[int]) -> Tensor:
        """Return the last committed token of `rows`, `(len(rows),)`: the anchors."""
        ends = torch.tensor([self.lengths[row] - 1 for row in rows], device=self.device)
        return self._ids[torch.tensor(list(rows), device=self.device), ends]

    def row(self, row: int) -> Tensor:
        """Return one row's ids, `(length,)`."""
        return self._ids[row, : self.lengths[row]]

    def with_ahead(self, rows: Sequence[int], ahead: Tensor) -> Tensor:
        """Return all rows' ids `(B, *)` with `ahead` `(len(rows), A)` put after the committed tokens of `rows`."""
        width = max(self.lengths) + ahead.shape[1]
        ids = self._ids.new_full((self.batch_size, width), self.pad_token_id)
        known = min(width, self._ids.shape[1])
        ids[:, :known] = self._ids[:, :known]
        for index, row in enumerate(rows):
            ids[row, self.lengths[row] : self.lengths[row] + ahead.shape[1]] = ahead[index]
        return ids

    def padded(self) -> Tensor:
        """Return all rows' ids `(B, longest row)`, padded at the end."""
        return self.with_ahead([], self._ids.new_empty(0, 0))
