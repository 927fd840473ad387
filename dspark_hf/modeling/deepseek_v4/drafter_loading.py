"""Read the DSpark module out of a DeepSeek-V4 checkpoint, and nothing else of it."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dspark_hf.modeling.deepseek_v4.drafter_names import PREFIX, our_name
from dspark_hf.modeling.deepseek_v4.formats import dequantize
from dspark_hf.modeling.deepseek_v4.linear import swap_linears
from dspark_hf.modeling.deepseek_v4.reading import HUB_OPTIONS, iterate_tensors, read_index

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)
_WEIGHT, _SCALE = "weight", "scale"


def load_module(
    cls: type[AnyModel],
    name_or_path: str | os.PathLike,
    config: Any,
    *,
    dtype: torch.dtype | str | None = None,
    keep_quantized: bool | None = None,
    device_map: Any = None,
    **options: Any,
) -> AnyModel:
    """Return the drafter of the tensors `mtp.*`; from the hub, only the files that hold them are fetched.

    Args:
        cls: the drafter's class.
        name_or_path: folder or hub name of the checkpoint.
        config: the drafter's configuration.
        dtype: of floating-point weights; default, and `"auto"`: as stored.
        keep_quantized: whether FP8 and FP4 weights stay as they are and are dequantised for every product; default:
            unless `dtype` is given.
        device_map: a device; default the CPU.
        options: hub options as in Transformers.

    Raises:
        ValueError: if a tensor is missing or unexpected, or an argument is of no use here.
    """
    hub_options = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    if options or isinstance(device_map, dict) or device_map in ("auto", "balanced", "sequential"):
        raise ValueError(
            "`from_pretrained` must be given `dtype`, `keep_quantized`, a single device as `device_map` and hub "
            f"options for the module of a DeepSeek-V4 checkpoint, got {sorted(options) or device_map!r}. Leave them "
            "out."
        )
    wanted: torch.dtype | None = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    is_kept = wanted is None if keep_quantized is None else keep_quantized
    infos = read_index(name_or_path, PREFIX, **hub_options)
    num_stages = config.num_hidden_layers
    ours = {our_name(name, num_stages): name for name in infos}
    with torch.device("meta"):
        drafter = cls(config)
    if is_kept:
        swap_linears(drafter, {name: infos[released] for name, released in ours.items()})
    expected = {name for name, _ in drafter.named_parameters()}
    found = set(ours) if is_kept else {name for name in ours if not name.endswith(f".{_SCALE}")}
    if expected != found:
        raise ValueError(
            "`pretrained_model_name_or_path` must hold exactly the tensors of its DSpark module, got "
            f"{sorted(expected ^ found)[:5]} without a counterpart in {str(name_or_path)!r}. Fetch them anew."
        )
    tensors = dict(iterate_tensors(infos, infos))
    weights = {
        name: _weight(name, released, tensors, wanted, is_kept=is_kept)
        for name, released in ours.items()
        if name in expected
    }
    drafter.load_state_dict(weights, strict=True, assign=True)
    drafter.name_or_path = str(name_or_path)
    for parameter in drafter.parameters():
        parameter.requires_grad_(False)
    return drafter.to(device_map).eval() if device_map is not None else drafter.eval()


def _weight(
    name: str, released: str, tensors: dict[str, Tensor], dtype: torch.dtype | None, *, is_kept: bool
) -> Tensor:
    tensor = tensors[released]
    scale = tensors.get(released.removesuffix(_WEIGHT) + _SCALE) if released.endswith(f".{_WEIGHT}") else None
    if name.endswith(f".{_SCALE}") or (scale is not None and is_kept):
        return tensor
    if scale is not None:
        return dequantize(tensor, scale, dtype or torch.bfloat16)
    # hyper-connections, sinks and biases of the gates are stored in fp32 and stay so
    return tensor if dtype is None or tensor.dtype == torch.float32 else tensor.to(dtype)
