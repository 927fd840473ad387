"""Which slots of a ragged cache the tokens of a pass see.

B batch, W tokens of a pass, S slots.
"""

from __future__ import annotations

import sys

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
    chunk: int | None = None,
    tree: Tree | None = None,
    columns: SlotColumns | None = None,
) -> Tensor:
    """Return which slots each token of a pass sees, `(B, W, S)`.

    Takes the tokens' `positions` `(B, W)`, `starts` `(B)`, the slots of every row's first one, and the `window` of a
    sliding attention or the size of the `chunk` that a token sees of its text. Slots before a row's start hold the
    token at the position of the same number. Windows and chunks count positions, or `columns` where they are given.
    """
    slots, query = torch.arange(num_slots, device=positions.device), positions[..., None]
    if tree is not None:
        visible, held = _visible_in_tree(slots, starts, tree)
    else:
        visible, held = slots <= query, slots.expand(len(positions), 1, -1)
    if (window or chunk) and columns is not None:
        # a chunk begins with the row's first token
        first = columns.of(torch.zeros_like(positions[:, :1]))[..., None]
        held, query = columns.of(held) - first, columns.of(query) - first
    if window:
        visible = visible & (held > query - window)
    if chunk:
        visible = visible & (held // chunk == query // chunk)
    return visible


def shows_past_windows(model: PreTrainedModel) -> bool:
    """Return whether the model's own mask leaves sliding windows to the cache, as Moshi's does.

    One token then sees its window, since the cache holds no more, and several tokens of a pass see more than that.
    """
    config = model.config.get_text_config(decoder=True)
    made_by = vars(sys.modules[type(model).__module__])
    return (
        getattr(config, "sliding_window", None) is not None
        and "create_causal_mask" in made_by
        and not made_by.keys() & {"create_sliding_window_causal_mask", "create_masks_for_generate"}
    )


def shown(visible: Tensor, model: PreTrainedModel) -> Tensor:
    """Return `visible` `(B, W, S)` as the mask `(B, 1, W, S)` that the model's attention takes."""
    visible = visible[:, None]
    if attention_implementation(model) != "eager":
        return visible
    return torch.zeros_like(visible, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min)


def _visible_in_tree(slots: Tensor, starts: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
    """Return which slots are seen, `(B, W, S)`, and the positions of what they hold, `(B, 1, S)`."""
    width = len(tree.parents)
    offsets = slots - starts[:, None]  # [B, S]
    index = offsets.clamp(0, width - 1)
    seen = tree.ancestry.to(slots.device)[:, index].transpose(0, 1)  # [B, W, S]
    visible = (offsets < 0)[:, None] | (seen & (offsets < width)[:, None])
    depths = torch.tensor(tree.depths, device=slots.device)
    return visible, torch.where(offsets < 0, slots, starts[:, None] + depths[index])[:, None]
