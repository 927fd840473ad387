"""Where a model's weights lie: on one device, on several, or partly on disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dspark_hf.modeling.deepseek_v4.checkpoints.loading import Checkpoint, Loading, read_weights, set_parameter

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_DISK = "disk"
Device: TypeAlias = int | str | torch.device
DeviceMap: TypeAlias = dict[str, Device]


class Offload:
    """Weights that stay on disk: in the checkpoint itself or, where they were dequantised, in a folder.

    Args:
        checkpoint: where weights are.
        folder: for what the checkpoint does not hold in a form that can be read at once.
    """

    def __init__(self, checkpoint: Checkpoint, folder: str | os.PathLike | None):
        self._checkpoint = checkpoint
        self._folder = None if folder is None else Path(folder).absolute()
        self.index: dict[str, dict[str, str]] = {}

    @property
    def files(self) -> set[Path]:
        """The files that weights are read from."""
        return {Path(entry["safetensors_file"]) for entry in self.index.values()}

    def refer(self, loading: Loading) -> None:
        """Read a weight from the checkpoint whenever it is needed."""
        info = self._checkpoint.target[loading.official]
        stored = self._checkpoint.names.get(loading.official, loading.official)
        self._add(loading, info.file, stored)

    def write(self, loading: Loading, tensor: Tensor) -> None:
        """Write a dequantised weight to the folder.

        Raises:
            ValueError: if there is none.
        """
        if self._folder is None:
            raise ValueError(
                "`offload_folder` must be given where dequantised weights are put on disk, got None. Name a folder, "
                "or keep the weights quantised: those are read from the checkpoint itself."
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{loading.own}.safetensors"
        save_file({loading.own: tensor.contiguous()}, file)
        self._add(loading, file, loading.own)

    def _add(self, loading: Loading, file: Path, name: str) -> None:
        dtype = str(loading.dtype).removeprefix("torch.")
        self.index[loading.own] = {"safetensors_file": str(file), "weight_name": name, "dtype": dtype}


def fill(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    loadings: Mapping[str, Loading],
    device_map: DeviceMap,
    offload_folder: str | os.PathLike | None,
) -> Offload:
    """Load a prepared model's weights to the devices of `device_map`; return what stays on disk."""
    offload = Offload(checkpoint, offload_folder)
    loaded = {}
    for name, loading in loadings.items():
        if _device_of(loading.own, device_map) == _DISK and not loading.is_dequantized:
            offload.refer(loading)
        else:
            loaded[name] = loading
    for loading, tensor in read_weights(checkpoint, loaded):
        device = _device_of(loading.own, device_map)
        if device == _DISK:
            offload.write(loading, tensor)
        else:
            set_parameter(model, loading.own, tensor.to(device))
    return offload


def resolve_device_map(
    model: PreTrainedModel, device_map: str | Device | DeviceMap | None, max_memory: dict[Any, Any] | None
) -> DeviceMap:
    """Return the device of every part of a prepared model.

    Args:
        model: on the meta device, with the dtypes that it will hold.
        device_map: `"auto"`, `"balanced"`, `"balanced_low_0"` or `"sequential"`, a device for all, or a device for
            every part by name; None: the CPU.
        max_memory: bytes for every device, for the first four.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(device_map, dict):
        return _with_parameters_on_main(model, device_map)
    if device_map not in _STRATEGIES:
        return {"": "cpu" if device_map is None else _usable(device_map)}
    blocks = list(model._no_split_modules or ())
    if device_map != "sequential":
        is_low = device_map == "balanced_low_0"
        max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=blocks, low_zero=is_low)
    inferred = infer_auto_device_map(model, max_memory, no_split_module_classes=blocks)
    return _with_parameters_on_main(model, dict(inferred))


def _usable(device: Device) -> Device:
    try:
        if device != _DISK:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`device_map` must be one of {', '.join(_STRATEGIES)}, a device that PyTorch can use here, or a device "
            f"for every part, got {device!r}. Try auto. ({str(error).splitlines()[0]})"
        ) from error
    return device


def _with_parameters_on_main(model: PreTrainedModel, device_map: DeviceMap) -> DeviceMap:
    # accelerate 1.15: attach_align_device_hook_on_blocks fetches what modules hold, not parameters by name
    modules = {name for name, _ in model.named_modules()}
    real = [device for device in device_map.values() if device not in ("cpu", _DISK)]
    main = real[0] if real else "cpu"
    return {name: device if name in modules else main for name, device in device_map.items()}


def dispatch(model: PreTrainedModel, device_map: DeviceMap, offload: Offload) -> None:
    """Let a filled model fetch its weights from where they are, and move states between devices."""
    if len(set(device_map.values())) > 1 or offload.index:
        with warnings.catch_warnings():
            # parameters between modules are in the map, and in their place already
            warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
            dispatch_model(
                model,
                device_map=device_map,
                offload_index=offload.index or None,
                skip_keys=model._skip_keys_device_placement,
            )
    model.hf_device_map = device_map  # type: ignore[assignment]  # as Transformers keeps it


def _device_of(name: str, device_map: DeviceMap) -> Device:
    part = name
    while part not in device_map:
        if not part:
            raise ValueError(f"`device_map` must name a device for every weight, got none for {name}. Add one.")
        part = part.rpartition(".")[0]
    return device_map[part]
