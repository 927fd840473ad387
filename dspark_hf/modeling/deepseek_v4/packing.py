"""Padding taken out of a batch on entry and put back on exit.

B batch, T columns, W packed width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_hf.generation.targets.padding import pack_order, unpack


class Packing:
    """Move every row's real tokens to its front.

    Args:
        attention_mask: `(B, S)`, its last T columns those of this pass; None, or all ones: nothing to do.
        shape: B and T.
        num_columns: columns that the cache has seen, padding included.

    Raises:
        ValueError: if the mask has another form.
    """

    def __init__(self, attention_mask: Tensor | None, shape: tuple[int, ...], num_columns: int):
        batch, self.num_columns = shape
        self.width = self.num_columns
        self.counts = [self.width] * batch
        self._order: Tensor | None = None
        if attention_mask is None:
            return
        if attention_mask.ndim != 2 or attention_mask.shape[1] not in (num_columns + self.width, self.width):
            raise ValueError(
                f"`attention_mask` must have the shape {(batch, num_columns + self.width)}, one entry a token so far "
                f"and now, got {tuple(attention_mask.shape)}. DeepSeek-V4 builds its own masks from it."
            )
        mask = attention_mask[:, -self.width :].bool()
        if bool(mask.all()):
            return
        self._mask = mask
        self._order, self.counts = pack_order(mask)
        self.width = max(self.counts)

    def pack(self, values: Tensor) -> Tensor:
        """Return values `(B, T, *)` as `(B, W, *)`."""
        if self._order is None:
            return values
        order = self._order.to(values.device)
        return values[torch.arange(len(values), device=values.device)[:, None], order]

    def unpack(self, values: Tensor) -> Tensor:
        """Return values `(B, W, *)` as `(B, T, *)`, zeros where padding is."""
        if self._order is None:
            return values
        return unpack(values, self._mask, self._order)
