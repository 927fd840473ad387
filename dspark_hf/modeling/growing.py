"""A drafter with more layers and more tapped layers than one that is there, and the same drafts to begin with.

M tapped layers, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# what a layer adds to its input goes through these last
_OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
# or through these: a norm would make the smallest output that training gives a layer as large as any
_OUTPUT_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


def grow_drafter(
    drafter: Any,
    *,
    num_hidden_layers: int | None = None,
    target_layer_ids: Sequence[int] | None = None,
    num_target_layers: int | None = None,
) -> Any:
    """Return a drafter with further layers on top and further tapped layers of the target, which drafts as `drafter`.

    What is new begins without effect: a new layer adds zero to what passes it, and the context projection's columns of
    a new tap `(D, D)` are zero. Training then finds a use for it. New layers see the whole context, or what the others
    see where all have the same window.

    Args:
        drafter: the drafter; left as it is.
        num_hidden_layers: of the grown one; None for as many as there are.
        target_layer_ids: those of the grown one, in ascending order; None for the ones there are.
        num_target_layers: decoder layers of the target; None for as many as the drafter knows of. Other packagings may
            not say how many there are, and are then taken to have none behind the last tapped one.

    Raises:
        ValueError: if anything were to be taken away, or a tap lies behind the target's layers, or the drafter is a
            module of DeepSeek-V4.
    """
    config = copy.deepcopy(drafter.config)
    count = config.num_hidden_layers if num_hidden_layers is None else num_hidden_layers
    layer_ids = config.target_layer_ids if target_layer_ids is None else list(target_layer_ids)
    if count == config.num_hidden_layers and layer_ids == config.target_layer_ids:
        return drafter
    _check(config, count, layer_ids)
    config.num_hidden_layers, config.target_layer_ids = count, layer_ids
    config.num_target_layers = max(config.num_target_layers, num_target_layers or 0)
    # what it proposed so far says little about it once it is trained
    config.accept_rates = None
    grown = type(drafter)(type(config)(**config.to_dict())).to(device=drafter.device, dtype=drafter.dtype)
    if drafter.draft_token_ids is not None:
        grown.set_draft_token_ids(drafter.draft_token_ids)
    weights = {**grown.state_dict(), **drafter.state_dict()}
    weights["fc.weight"] = _columns(drafter.fc.weight.detach(), drafter.config.target_layer_ids, layer_ids)
    for layer in range(drafter.config.num_hidden_layers, count):
        for name in _OUTPUT_NORMS if grown.layers[layer].has_sandwich_norms else _OUTPUTS:
            for key in (f"layers.{layer}.{name}.weight", f"layers.{layer}.{name}.bias"):
                if key in weights:
                    weights[key] = torch.zeros_like(weights[key])
    grown.load_state_dict(weights)
    grown.recommended = drafter.recommended
    return grown.train(drafter.training)


def _check(config: Any, count: int, layer_ids: Sequence[int]) -> None:
    if config.deepseek_v4 is not None:
        raise ValueError(
            "`drafter` must have a backbone of plain layers to grow, got a module of DeepSeek-V4, whose stages mix "
            "streams. Train it as it is."
        )
    if count < config.num_hidden_layers:
        raise ValueError(
            f"`num_hidden_layers` must be at least the {config.num_hidden_layers} that the drafter has, got {count}. "
            "Make a new drafter with fewer."
        )
    gone = [layer_id for layer_id in config.target_layer_ids if layer_id not in layer_ids]
    if gone:
        raise ValueError(
            f"`target_layer_ids` must hold the layers {config.target_layer_ids} that the drafter reads, got "
            f"{list(layer_ids)} without {gone}. Add them, or make a new drafter."
        )


def _columns(weight: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Return the context projection `(D, M * D)` for other tapped layers: old columns, zeros for new taps."""
    parts = dict(zip(before, weight.split(weight.shape[0], dim=1), strict=True))
    nothing = torch.zeros_like(weight[:, : weight.shape[0]])
    return torch.cat([parts.get(layer_id, nothing) for layer_id in after], dim=1)
