"""Weights from a checkpoint into a model: as they are stored or dequantised, tensor by tensor.

An official name is that of the released checkpoints; a model's own name may have `model.` before it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from dspark_hf.modeling.deepseek_v4.formats import SCALE_DTYPES, dequantize, scale_shape
from dspark_hf.modeling.deepseek_v4.linear import BAR_DELAY, QUANTIZED, dequantized_shape, swap_linears
from dspark_hf.modeling.formats.tensors import TensorInfo, iterate_tensors, read_index

_OWN_PREFIX = "model."
_EMBEDDING = "embed.weight"
# a bare decoder has no output head
_HEAD = "head.weight"
_NUM_NAMED = 5


@dataclass
class Checkpoint:
    """What a checkpoint holds of one model, by official name.

    When a DSpark module is loaded, its tensors stand in the target's place, by the drafter's own names.
    """

    target: dict[str, TensorInfo]
    # names in the files, where they are not the official ones
    names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(
        cls, name_or_path: str | os.PathLike, is_left_out: Callable[[str], bool], **hub_options: Any
    ) -> Checkpoint:
        """Return what a folder or hub name holds, without reading tensors; both layouts are understood.

        Files with nothing but tensors that are left out are neither opened nor fetched.
        """
        infos = read_index(name_or_path, is_left_out=is_left_out, **hub_options)
        names = {official_name(name): name for name in infos}
        return cls({official: infos[name] for official, name in names.items()}, names)

    @property
    def plain_dtype(self) -> torch.dtype:
        """Dtype of weights that are not quantised."""
        info = self.target.get(_EMBEDDING)
        return torch.bfloat16 if info is None or info.dtype in QUANTIZED else info.dtype

    def is_quantized(self, name: str) -> bool:
        """Return whether a tensor is a weight in FP8 or FP4, which is nothing without its scales."""
        return name.endswith(".weight") and self.target[name].dtype in QUANTIZED

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the target's tensors by official name, file by file."""
        wanted = {self.stored_name(name): name for name in names}
        infos = {name: self.target[official] for name, official in wanted.items()}
        for name, tensor in iterate_tensors(infos, infos):
            yield wanted[name], tensor

    def stored_name(self, name: str) -> str:
        """Return the name in the files of an official one."""
        return self.names.get(name, name)


def official_name(name: str) -> str:
    """Return the official name of a model's own one."""
    return name.removeprefix(_OWN_PREFIX)


def scale_name(name: str) -> str:
    """Return the name of a weight's scales."""
    return f"{name.removesuffix('.weight')}.scale"


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that a caller asks for, or None for "as stored".

    Raises:
        ValueError: if it is none for weights.
    """
    if dtype is None or dtype == "auto":
        return None
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if parsed not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"`dtype` must be a floating-point dtype, got {dtype!r}. Leave it out, or choose bfloat16.")
    return parsed


@dataclass(frozen=True)
class Loading:
    """How one tensor of a model comes from a checkpoint: its own and official name, and the dtype to hold it in."""

    own: str
    official: str
    dtype: torch.dtype
    is_dequantized: bool


def prepare(
    model: PreTrainedModel, checkpoint: Checkpoint, *, dtype: torch.dtype | None, is_kept: bool
) -> dict[str, Loading]:
    """Give a model on the meta device the layers and dtypes that it will hold, and return how to load it.

    Args:
        model: on the meta device.
        checkpoint: where its weights are.
        dtype: of floating-point weights, but for those that the model keeps in fp32; None: as stored.
        is_kept: whether weights in FP8 and FP4 stay so.

    Returns:
        By official name, one entry for every parameter.

    Raises:
        ValueError: if tensors are missing, unexpected or of another size.
    """
    if is_kept:
        infos = checkpoint.target.items()
        swap_linears(model, {own: info for name, info in infos for own in (name, f"{_OWN_PREFIX}{name}")})
    own_names = {official_name(own): own for own, _ in model.named_parameters()}
    _check_names(model, checkpoint, own_names)
    _check_shapes(model, checkpoint, own_names)
    loadings = {}
    for name, own in own_names.items():
        is_dequantized = checkpoint.is_quantized(name) and scale_name(name) not in own_names
        held = _held_dtype(model, name, checkpoint, dtype, is_dequantized=is_dequantized)
        loadings[name] = Loading(own, name, held, is_dequantized)
        parameter = model.get_parameter(own)
        set_parameter(model, own, torch.empty_like(parameter, dtype=held))
    return loadings


def is_fp32(model: PreTrainedModel, name: str) -> bool:
    """Return whether a model holds the weight of this official name in fp32, whatever dtype was asked for."""
    return any(part in name for part in model._keep_in_fp32_modules_strict or ())


def _held_dtype(
    model: PreTrainedModel, name: str, checkpoint: Checkpoint, dtype: torch.dtype | None, *, is_dequantized: bool
) -> torch.dtype:
    stored = checkpoint.target[name].dtype
    if is_dequantized:
        stored = checkpoint.plain_dtype
    elif not stored.is_floating_point or checkpoint.is_quantized(name) or name.endswith(".scale"):
        # tables of experts, and what stays as it is stored
        return stored
    return torch.float32 if is_fp32(model, name) else dtype or stored


def _check_names(model: PreTrainedModel, checkpoint: Checkpoint, own_names: Mapping[str, str]) -> None:
    scales = {scale_name(name) for name in own_names if name in checkpoint.target and checkpoint.is_quantized(name)}
    wanted = own_names.keys() | scales
    allowed = wanted | {_HEAD} if model.get_output_embeddings() is None else wanted
    for kind, rule, names in (
        ("missing", "hold every weight of the model, with its scales", wanted - checkpoint.target.keys()),
        ("unexpected", "hold no weights that the model has no place for", checkpoint.target.keys() - allowed),
    ):
        if names:
            shown = _some(checkpoint.stored_name(name) for name in names)
            raise ValueError(
                f"`pretrained_model_name_or_path` must {rule}, got {len(names)} {kind}: {shown}. Use the "
                "configuration that belongs to the checkpoint, or fetch its missing files."
            )


def _check_shapes(model: PreTrainedModel, checkpoint: Checkpoint, own_names: Mapping[str, str]) -> None:
    for name, own in own_names.items():
        info, wanted = checkpoint.target[name], tuple(model.get_parameter(own).shape)
        is_dequantized = checkpoint.is_quantized(name) and scale_name(name) not in own_names
        shape = dequantized_shape(info.dtype, info.shape) if is_dequantized else tuple(info.shape)
        _require_shape(checkpoint, name, shape, wanted)
        if checkpoint.is_quantized(name):
            scale = checkpoint.target[scale_name(name)]
            _require_shape(checkpoint, scale_name(name), scale.shape, scale_shape(info.dtype, info.shape))
            if scale.dtype not in SCALE_DTYPES:
                raise ValueError(
                    f"`{checkpoint.stored_name(scale_name(name))}` must be in E8M0 or fp32, got {scale.dtype}. Take a "
                    "checkpoint in the released formats."
                )


def _require_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ValueError(
            f"`{checkpoint.stored_name(name)}` must have the shape {wanted}, got {shape} in "
            f"{str(checkpoint.target[name].file)!r}. Use the configuration that belongs to the checkpoint, or fetch "
            "that file again."
        )


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - _NUM_NAMED
    return ", ".join(ordered[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` itself the parameter of this name; integers take no gradient."""
    owner, _, leaf = name.rpartition(".")
    parameters = model.get_submodule(owner)._parameters
    old = parameters[leaf]
    requires_grad = old is not None and old.requires_grad and tensor.is_floating_point()
    parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)


def read_weights(checkpoint: Checkpoint, loadings: Mapping[str, Loading]) -> Iterator[tuple[Loading, Tensor]]:
    """Yield the weights in the dtypes to hold them in, one by one; what is kept as stored is a view of the file.

    A bar shows how many of them are there, unless that takes no time or Transformers' bars are off.
    """
    with logging.tqdm(total=len(loadings), desc="Loading weights", delay=BAR_DELAY) as bar:
        for weight in _read_weights(checkpoint, loadings):
            yield weight
            bar.update()


def _read_weights(checkpoint: Checkpoint, loadings: Mapping[str, Loading]) -> Iterator[tuple[Loading, Tensor]]:
    scales = {scale_name(name): name for name, loading in loadings.items() if loading.is_dequantized}
    # of a weight and its scales, what came first
    waiting: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors([*loadings, *scales]):
        weight_name = scales.get(name, name)
        loading = loadings[weight_name]
        if not loading.is_dequantized:
            yield loading, tensor.to(loading.dtype)
        elif weight_name not in waiting:
            waiting[weight_name] = tensor
        else:
            other = waiting.pop(weight_name)
            weight, scale = (other, tensor) if name in scales else (tensor, other)
            yield loading, dequantize(weight, scale, loading.dtype)
