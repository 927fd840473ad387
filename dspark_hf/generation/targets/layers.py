"""Where a model keeps its decoder layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def find_decoder_layers(model: PreTrainedModel, num_layers: int) -> nn.ModuleList:
    """Return the decoder layers of a causal LM whose configuration counts `num_layers`.

    Raises:
        ValueError: if there is no list of layers.
    """
    decoder = model.get_decoder()
    # where `decoder` is the name of the output head (ModernBERT)
    root = decoder if isinstance(decoder, nn.Module) and any(_outer_lists(decoder, "")) else model
    lists = dict(_outer_lists(root, ""))
    embedding = model.get_input_embeddings()
    place = next((name for name, module in root.named_modules() if module is embedding), "")
    ranked = sorted(lists, key=lambda name: _rank(lists[name], name, num_layers, place))
    if not ranked or not _are_layers(lists[ranked[0]], num_layers):
        raise ValueError(
            f"`target` must hold its {num_layers} decoder layers in one ModuleList, got {type(model).__name__} "
            "without one. Use a decoder-only causal LM of Transformers."
        )
    return lists[ranked[0]]


def _outer_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Give the lists of modules by name, but for those within lists."""
    for name, child in module.named_children():
        full_name = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.ModuleList):
            yield full_name, child
        else:
            yield from _outer_lists(child, full_name)


def _are_layers(modules: nn.ModuleList, num_layers: int) -> bool:
    # configurations may count otherwise: two attentions a layer (LongCat-Flash), or every turn of a loop (HRM)
    return len(modules) == num_layers or (len(modules) > 0 and _is_layer(modules[0]))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def _rank(modules: nn.ModuleList, name: str, num_layers: int, embedding: str) -> tuple[bool, bool, int]:
    """Return what the decoder layers are smallest in among lists of modules."""
    has_layers = len(modules) > 0 and _is_layer(modules[0])
    return len(modules) != num_layers, not has_layers, _distance(name, embedding)


def _distance(name: str, other: str) -> int:
    """Return how many steps lead from one module to another; those of an image encoder lie far from the tokens'."""
    parts, others = name.split("."), other.split(".")
    shared = 0
    while shared < min(len(parts), len(others)) and parts[shared] == others[shared]:
        shared += 1
    return len(parts) + len(others) - 2 * shared
