"""A drafter that starts from its target's last layers."""

from __future__ import annotations

from typing import Any

import torch

from dspark_hf.generation.targets.adapter import TargetAdapter


def copy_last_layers(target: TargetAdapter, drafter: Any) -> None:
    """Copy the target's last layers and final norm into the drafter, and let `fc` pass its last tapped layer through.

    Raises:
        ValueError: if the target's layers are too few, or not built like the drafter's (Llama and Qwen kinds are),
            or quantised.
    """
    count = len(drafter.layers)
    if count > target.num_layers:
        raise ValueError(
            f"`num_hidden_layers` must be at most {target.num_layers} for a warm start from this target, got {count}. "
            "Pass fewer layers or `warm_start=False`."
        )
    with torch.no_grad():
        for ours, theirs in zip(drafter.layers, target.layers[-count:], strict=True):
            _copy_layer(ours, theirs)
        drafter.fc.weight.mul_(0.1)
        width = target.hidden_size
        drafter.fc.weight[:, -width:].add_(torch.eye(width, device=drafter.fc.weight.device))
        final_norm = getattr(target.model.get_decoder(), "norm", None)
        if final_norm is not None:
            drafter.norm.load_state_dict({"weight": _norm_scale(final_norm)})
        # the context passes the norm that the copied layer would have applied to it
        drafter.hidden_norm.load_state_dict(drafter.layers[0].get_submodule("input_layernorm").state_dict())
        if drafter.markov_head is not None:
            drafter.markov_head.markov_w2.weight.zero_()


def _copy_layer(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    parameters = dict(ours.named_parameters())
    source = {name: tensor for name, tensor in theirs.named_parameters() if not name.endswith("bias")}
    shapes, source_shapes = ({name: tuple(x.shape) for name, x in part.items()} for part in (parameters, source))
    if shapes != source_shapes:
        odd = sorted(name for name, _ in shapes.items() ^ source_shapes.items())
        raise ValueError(
            f"`warm_start` must find the target's layers built like the drafter's, got {type(theirs).__name__}, which "
            f"differs in {sorted(set(odd))}. Pass `warm_start=False`."
        )
    if not all(tensor.is_floating_point() for tensor in source.values()):
        raise ValueError(
            f"`warm_start` must find the target's layers in floating point, got a quantised {type(theirs).__name__}. "
            "Pass `warm_start=False`."
        )
    for name, parameter in parameters.items():
        is_norm = parameter.ndim == 1
        parameter.copy_(_norm_scale(theirs.get_submodule(name.removesuffix(".weight"))) if is_norm else source[name])


def _norm_scale(norm: torch.nn.Module) -> torch.Tensor:
    """Return what a norm multiplies by: its weight, or 1 + weight where the weight is stored around zero (Gemma)."""
    weight = norm.get_parameter("weight")
    scaled = norm(torch.ones_like(weight))
    is_around_zero = (scaled - weight - 1).abs().mean() < (scaled - weight).abs().mean()
    return weight + 1 if is_around_zero else weight
