"""Which slots of a ragged cache the tokens of a pass see.

B batch, W tokens of a pass, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_hf.generation.targets.trees import Tree


def visible_slots(
    positions: Tensor, starts: Tensor, num_slots: int, *, window: int | None = None, tree: Tree | None = None
) -> Tensor:
    """Return which slots each token of a pass sees, `(B, W, S)`.

    Takes the tokens' `positions` `(B, W)`, `starts` `(B)`, the slots of every row's first one, and the `window` of a
    sliding attention. Slots before a row's start hold the token at the position of the same number.
    """
    slots, query = torch.arange(num_slots, device=positions.device), positions[..., None]
    if tree is not None:
        return _visible_in_tree(slots, query, starts, window, tree)
    visible = slots <= query
    if window:
        visible &= slots > query - window
    return visible


def _visible_in_tree(slots: Tensor, query: Tensor, starts: Tensor, window: int | None, tree: Tree) -> Tensor:
    width = len(tree.parents)
    offsets = slots - starts[:, None]  # [B, S]
    index = offsets.clamp(0, width - 1)
    seen = tree.ancestry.to(slots.device)[:, index].transpose(0, 1)  # [B, W, S]
    visible = (offsets < 0)[:, None] | (seen & (offsets < width)[:, None])
    if window:
        depths = torch.tensor(tree.depths, device=slots.device)
        held = torch.where(offsets < 0, slots, starts[:, None] + depths[index])
        visible &= held[:, None] > query - window
    return visible
