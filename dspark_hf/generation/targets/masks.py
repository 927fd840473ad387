"""Which slots of a ragged cache the tokens of a pass see.

B batch, W tokens of a pass, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dspark_hf.generation.compat import attention_implementation
from dspark_hf.generation.targets.columns import SlotColumns
from dspark_hf.generation.targets.trees import Tree


def visible_slots(
    positions: Tensor,
    starts: Tensor,
    num_slots: int,
    *,
    window: int | None = None,
    tree: Tree | None = None,
    columns: SlotColumns | None = None,
) -> Tensor:
    """Return which slots each token of a pass sees, `(B, W, S)`.

    Takes the tokens' `positions` `(B, W)`, `starts` `(B)`, the slots of every row's first one, and the `window` of a
    sliding attention. Slots before a row's start hold the token at the position of the same number. A window counts
    positions, or `columns` where they are given.
    """
    slots, query = torch.arange(num_slots, device=positions.device), positions[..., None]
    if tree is not None:
        return _visible_in_tree(slots, query, starts, window, tree, columns)
    visible = slots <= query
    if window:
        visible = visible & _is_near(slots.expand(len(positions), 1, -1), query, window, columns)
    return visible


def shown(visible: Tensor, model: PreTrainedModel) -> Tensor:
    """Return `visible` `(B, W, S)` as the mask `(B, 1, W, S)` that the model's attention takes."""
    visible = visible[:, None]
    if attention_implementation(model) != "eager":
        return visible
    return torch.zeros_like(visible, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min)


def _is_near(held: Tensor, query: Tensor, window: int, columns: SlotColumns | None) -> Tensor:
    """Return whether tokens at positions `held` `(B, 1, S)` lie in the window of those at `query` `(B, W, 1)`."""
    if columns is not None:
        held, query = columns.of(held), columns.of(query)
    return held > query - window


def _visible_in_tree(
    slots: Tensor, query: Tensor, starts: Tensor, window: int | None, tree: Tree, columns: SlotColumns | None
) -> Tensor:
    width = len(tree.parents)
    offsets = slots - starts[:, None]  # [B, S]
    index = offsets.clamp(0, width - 1)
    seen = tree.ancestry.to(slots.device)[:, index].transpose(0, 1)  # [B, W, S]
    visible = (offsets < 0)[:, None] | (seen & (offsets < width)[:, None])
    if window:
        depths = torch.tensor(tree.depths, device=slots.device)
        held = torch.where(offsets < 0, slots, starts[:, None] + depths[index])
        visible &= _is_near(held[:, None], query, window, columns)
    return visible
