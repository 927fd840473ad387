"""Drafts that branch, on one unpadded row: a pass's masks over Transformers' own cache, and a path that closes up.

W tokens of a pass, S columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from dspark_hf.generation.compat import CACHE_KEY, empty_cache_like, is_placeholder_layer
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.masks import shown, visible_slots
from dspark_hf.generation.targets.prompts import foreign_preparation, has_text_alone
from dspark_hf.generation.targets.ragged_cache import PLAIN_LAYERS, has_plain_attention
from dspark_hf.generation.targets.trees import Tree


def can_branch(adapter: TargetAdapter, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> bool:
    """Return whether a pass of the target may be told by mask and positions which tokens continue which."""
    model, cache = adapter.model, model_kwargs[CACHE_KEY]
    kinds = [type(layer) for layer in empty_cache_like(model).layers]
    return (
        has_plain_attention(model)
        # a cache of the user's may keep all where the model has a window
        and kinds == [type(layer) for layer in cache.layers]
        and all(type(layer) in PLAIN_LAYERS or is_placeholder_layer(layer) for layer in cache.layers)
        and not getattr(cache, "offloading", False)
        and adapter.accepts("position_ids")
        and has_text_alone(model_kwargs)
        and model_kwargs.get("token_type_ids") is None
        and foreign_preparation(model) is None
        and not generation_config.output_attentions
    )


def branched_inputs(
    adapter: TargetAdapter, cache: Any, inputs: dict[str, Any], tree: Tree, past_length: int
) -> dict[str, Any]:
    """Return the `inputs` of a pass over a chain as those of a pass over `tree`, behind `past_length` tokens."""
    width, device = len(tree.depths), adapter.device
    depths = torch.tensor(tree.depths, device=device)
    positions, starts = past_length + depths[None], torch.tensor([past_length], device=device)
    masks: dict[str, Tensor] = {}
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)
        kind = "sliding_attention" if window else "full_attention"
        if is_placeholder_layer(layer) or kind in masks:
            continue
        num_seen, first = layer.get_mask_sizes(width)
        visible = visible_slots(positions, starts, past_length + width, window=window, tree=tree)
        masks[kind] = shown(visible[..., first : first + num_seen], adapter.model)
    known = inputs.get("position_ids")
    # routers' losses would take the mask for one of tokens, and nobody asks for them here
    unread = {"output_router_logits": False} if adapter.accepts("output_router_logits") else {}
    return {
        **inputs,
        **unread,
        # a model with one kind of layer takes one mask, a hybrid one a mask per kind
        "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
        "position_ids": positions if known is None else known[..., depths],
    }


def close_up(layers: Sequence[Any], width: int, path: Sequence[int]) -> None:
    """Move the tokens at `path` of the last pass, of `width` tokens, to its front."""
    for layer in layers:
        if is_placeholder_layer(layer):
            continue
        for states in (layer.keys, layer.values):
            start = states.shape[2] - width
            index = start + torch.tensor(path, device=states.device)
            states[:, :, start : start + len(path)] = states[:, :, index]
