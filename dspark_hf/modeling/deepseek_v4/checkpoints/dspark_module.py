"""Read the DSpark module out of a DeepSeek-V4 checkpoint, and nothing else of it."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from dspark_hf.modeling.deepseek_v4.checkpoints.loading import (
    Checkpoint,
    parse_dtype,
    prepare,
    read_weights,
    scale_name,
    set_parameter,
)
from dspark_hf.modeling.formats.deepseek_v4 import PREFIX, is_for_images, our_name, reads_images, released_name
from dspark_hf.modeling.formats.tensors import HUB_OPTIONS, read_index

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


def load_module(
    cls: type[AnyModel],
    name_or_path: str | os.PathLike,
    config: Any,
    *,
    dtype: torch.dtype | str | None = None,
    keep_quantized: bool | None = None,
    device_map: Any = None,
    cache_dtype: str | None = None,
    **options: Any,
) -> AnyModel:
    """Return the drafter of the tensors `mtp.*`; from the hub, only the files that hold them are fetched.

    Args:
        cls: the drafter's class.
        name_or_path: folder or hub name of the checkpoint.
        config: the drafter's configuration.
        dtype: of floating-point weights, but for those that stay in fp32; default, and `"auto"`: as stored.
        keep_quantized: whether FP8 and FP4 weights stay as they are and are dequantised for every product; default:
            unless `dtype` is given.
        device_map: a device; default the CPU.
        cache_dtype: that of the target's cache: with `"fp8"` the module's keys are rounded as released.
        options: hub options as in Transformers.

    Raises:
        ValueError: if a tensor is missing, unexpected or of another size, or an argument is of no use here.
    """
    hub_options = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    if options or isinstance(device_map, dict) or device_map in ("auto", "balanced", "sequential"):
        raise ValueError(
            "`from_pretrained` must be given `dtype`, `keep_quantized`, `cache_dtype`, a single device as "
            "`device_map` and hub options for the module of a DeepSeek-V4 checkpoint, got "
            f"{sorted(options) or device_map!r}. Leave them out."
        )
    dtype = parse_dtype(dtype)
    if cache_dtype is not None:
        config.backbone_config = {**config.backbone_config, "cache_dtype": cache_dtype}
    num_stages = config.num_hidden_layers
    is_left_out = is_for_images if reads_images(config.backbone_config) else None
    infos = read_index(name_or_path, PREFIX, is_left_out=is_left_out, **hub_options)
    stored = {our_name(name, num_stages): name for name in infos}
    with torch.device("meta"):
        drafter = cls(config)
    # an error names a missing tensor as the files would, its scales too
    expected = (ours for name, _ in drafter.named_parameters() for ours in (name, scale_name(name)))
    names = {**{ours: released_name(ours, num_stages) for ours in expected}, **stored}
    checkpoint = Checkpoint({ours: infos[name] for ours, name in stored.items()}, names)
    is_kept = dtype is None if keep_quantized is None else keep_quantized
    loadings = prepare(drafter, checkpoint, dtype=dtype, is_kept=is_kept)
    for loading, tensor in read_weights(checkpoint, loadings):
        set_parameter(drafter, loading.own, tensor.to("cpu" if device_map is None else device_map))
    drafter.name_or_path = str(name_or_path)
    return drafter.requires_grad_(False).eval()
