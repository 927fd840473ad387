"""Entries of rows that each have places of their own, read and written.

B batch, C places of a row, S of them; `*` any further dimensions.

With one index for a whole vector, `scatter_` in bf16 takes PyTorch's CPU kernels hundreds of times as long as what
stands here, and `gather` several times.
"""

from __future__ import annotations

import torch
from torch import Tensor


def put_at(store: Tensor, places: Tensor, entries: Tensor) -> None:
    """Write entries `(B, S, *)` into `store` `(B, C, *)` at `places` `(B, S)`.

    Example:

        >>> store = torch.zeros(2, 3, 1)
        >>> put_at(store, torch.tensor([[0], [2]]), torch.ones(2, 1, 1))
        >>> store[..., 0].tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    store[_rows(places), places] = entries


def take_at(store: Tensor, places: Tensor) -> Tensor:
    """Return the entries `(B, S, *)` of `store` `(B, C, *)` at `places` `(B, S)`.

    Example:

        >>> take_at(torch.arange(6).view(2, 3, 1), torch.tensor([[0], [2]])).flatten().tolist()
        [0, 5]
    """
    return store[_rows(places), places]


def _rows(places: Tensor) -> Tensor:
    return torch.arange(len(places), device=places.device)[:, None]
