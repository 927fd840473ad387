"""Which tensors a checkpoint holds, and the tensors themselves, one by one, from folders and from the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path


def read_index(name_or_path: str | os.PathLike, prefix: str = "", **hub_options: Any) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint whose names begin with `prefix`, without reading them.

    From the hub, only the files that hold such tensors are fetched, by the checkpoint's own index.

    Raises:
        ValueError: if there are no safetensors files, or none with such a tensor.
    """
    infos: dict[str, TensorInfo] = {}
    for file in _files(name_or_path, prefix, hub_options):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.startswith(prefix):
                    part = tensors.get_slice(name)
                    infos[name] = TensorInfo(_DTYPES[part.get_dtype()], tuple(part.get_shape()), file)
    if not infos:
        raise ValueError(
            f"`pretrained_model_name_or_path` must hold tensors {prefix + '*'!r} in safetensors files, got none in "
            f"{str(name_or_path)!r}. Check the name, or fetch the missing files."
        )
    return infos


def _files(name_or_path: str | os.PathLike, prefix: str, hub_options: dict[str, Any]) -> list[Path]:
    options = {name: value for name, value in hub_options.items() if name in HUB_OPTIONS and value is not None}
    index = cached_file(name_or_path, INDEX_NAME, _raise_exceptions_for_missing_entries=False, **options)
    if index is None:
        single = cached_file(name_or_path, SINGLE_NAME, _raise_exceptions_for_missing_entries=False, **options)
        return [] if single is None else [Path(single).absolute()]
    weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    names = sorted({file for name, file in weight_map.items() if name.startswith(prefix)})
    return [Path(str(cached_file(name_or_path, name, **options))).absolute() for name in names]


def iterate_tensors(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name, file by file, each as it is stored.

    They are views of the mapped file: memory is filled as they are read, and only what is written to is copied.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(infos[name].file, []).append(name)
    for file, its_names in sorted(by_file.items()):
        with safe_open(file, framework="pt") as tensors:
            for name in its_names:
                yield name, tensors.get_tensor(name)
