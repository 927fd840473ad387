"""Weights from a checkpoint into a model: as they are stored or dequantised, tensor by tensor, to where they belong.

An official name is that of the released checkpoints; a model's own name may have `model.` before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspark_hf.modeling.deepseek_v4.drafter_names import PREFIX
from dspark_hf.modeling.deepseek_v4.formats import dequantize
from dspark_hf.modeling.deepseek_v4.linear import QUANTIZED, dequantized_shape, swap_linears
from dspark_hf.modeling.deepseek_v4.reading import TensorInfo, iterate_tensors, read_index

_OWN_PREFIX = "model."
_EMBEDDING = "embed.weight"
# a bare decoder has no output head
_HEAD = "head.weight"
_NUM_NAMED = 5
Device = int | str | torch.device
DeviceMap = dict[str, Device]


@dataclass
class Checkpoint:
    """What a checkpoint holds, by official name: the target's tensors, and those of its DSpark module (`mtp.*`)."""

    target: dict[str, TensorInfo]
    module: dict[str, TensorInfo]
    # names in the files, where they are not the official ones
    names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, name_or_path: str | os.PathLike, **hub_options: Any) -> Checkpoint:
        """Return what a folder or hub name holds, without reading tensors; both layouts are understood."""
        infos = read_index(name_or_path, **hub_options)
        names = {official_name(name): name for name in infos if not name.startswith(PREFIX)}
        target = {official: infos[name] for official, name in names.items()}
        return cls(target, {name: info for name, info in infos.items() if name.startswith(PREFIX)}, names)

    @property
    def plain_dtype(self) -> torch.dtype:
        """Dtype of weights that are not quantised."""
        info = self.target.get(_EMBEDDING)
        return torch.bfloat16 if info is None or info.dtype in QUANTIZED else info.dtype

    @property
    def is_quantized(self) -> bool:
        """Whether some weights of the target are in FP8 or FP4."""
        return any(self.has_scale(name) for name in self.target)

    def has_scale(self, name: str) -> bool:
        """Return whether a weight is stored in FP8 or FP4."""
        return self.target[name].dtype in QUANTIZED and scale_name(name) in self.target

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the target's tensors by official name, file by file."""
        wanted = {self.names.get(name, name): name for name in names}
        infos = {name: self.target[official] for name, official in wanted.items()}
        for name, tensor in iterate_tensors(infos, infos):
            yield wanted[name], tensor


def official_name(name: str) -> str:
    """Return the official name of a model's own one."""
    return name.removeprefix(_OWN_PREFIX)


def scale_name(name: str) -> str:
    """Return the name of a weight's scales."""
    return f"{name.removesuffix('.weight')}.scale"


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
        swap_linears(model, {f"{own}": checkpoint.target[name] for own, name in _present(model, checkpoint)})
        _swap_scaled(model, checkpoint)
    own_names = {official_name(own): own for own, _ in model.named_parameters()}
    _check_names(model, checkpoint, own_names)
    _check_shapes(model, checkpoint, own_names)
    loadings = {}
    for name, own in own_names.items():
        is_dequantized = checkpoint.has_scale(name) and scale_name(name) not in own_names
        held = _held_dtype(model, name, checkpoint, dtype, is_dequantized=is_dequantized)
        loadings[name] = Loading(own, name, held, is_dequantized)
        parameter = model.get_parameter(own)
        set_parameter(model, own, torch.empty_like(parameter, dtype=held))
    return loadings
