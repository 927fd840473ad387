"""Which tensors a checkpoint holds, and the tensors themselves, from folders and from the hub."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# (index, single file) of a checkpoint, in the order they are looked for
_NAMES = ((INDEX_NAME, SINGLE_NAME), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
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


def _files(
    name_or_path: str | os.PathLike, prefix: str, hub_options: dict[str, Any], names: tuple[str, str] = _NAMES[0]
) -> list[Path]:
    options = {name: value for name, value in hub_options.items() if name in HUB_OPTIONS and value is not None}
    index_name, single_name = names
    index = cached_file(name_or_path, index_name, _raise_exceptions_for_missing_entries=False, **options)
    if index is None:
        single = cached_file(name_or_path, single_name, _raise_exceptions_for_missing_entries=False, **options)
        return [] if single is None else [Path(single).absolute()]
    files = sorted({file for name, file in _weight_map(Path(index)).items() if name.startswith(prefix)})
    return [Path(str(cached_file(name_or_path, file, **options))).absolute() for file in files]


def _weight_map(index: Path) -> dict[str, str]:
    """Return which file every tensor lies in, each a file beside the index."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"`pretrained_model_name_or_path` must hold an index with a `weight_map`, got {str(index)!r}, which is "
            f"damaged ({type(error).__name__}: {error}). Fetch it anew."
        ) from error
    strange = [file for file in files if not isinstance(file, str) or Path(file).name != file or file in ("", "..")]
    if strange:
        raise ValueError(
            f"`pretrained_model_name_or_path` must hold an index that names files of its own folder, got "
            f"{strange[0]!r} in {str(index)!r}. Do not use it: it reads what it was not given."
        )
    return weight_map


def read_shapes(name_or_path: str | os.PathLike, **hub_options: Any) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a checkpoint's tensors, in safetensors or `.bin` files, sharded or not.

    Raises:
        ValueError: if there are no such files, or one of them is damaged.
    """
    return {name: tuple(shape) for file in _any_files(name_or_path, hub_options) for name, shape in _shapes(file)}


def read_tensors(name_or_path: str | os.PathLike, **hub_options: Any) -> dict[str, Tensor]:
    """Return a checkpoint's tensors on the CPU, each as it is stored; of `.bin` files nothing but tensors is read.

    Raises:
        ValueError: if there are no such files, or one of them is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in _any_files(name_or_path, hub_options):
        tensors.update(_unpickled(file) if file.suffix == ".bin" else _mapped(file))
    return tensors


def _any_files(name_or_path: str | os.PathLike, hub_options: dict[str, Any]) -> list[Path]:
    for names in _NAMES:
        files = _files(name_or_path, "", hub_options, names)
        if files:
            return files
    known = ", ".join(name for names in _NAMES for name in reversed(names))
    raise ValueError(
        f"`pretrained_model_name_or_path` must hold tensors in one of {known}, got none of them in "
        f"{str(name_or_path)!r}. Check the name, or fetch the missing files."
    )


def _shapes(file: Path) -> list[tuple[str, Sequence[int]]]:
    if file.suffix == ".bin":
        return [(name, tensor.shape) for name, tensor in _unpickled(file).items()]
    try:
        with safe_open(file, framework="pt") as tensors:
            return [(name, tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _mapped(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        # nothing that a pickle asks for is run
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(file, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise _damaged(file, TypeError("not a dictionary of tensors"))
    return tensors


def _damaged(file: Path, error: Exception) -> ValueError:
    first_line = (str(error).splitlines() or [""])[0]
    return ValueError(
        f"`pretrained_model_name_or_path` must hold whole files of tensors, got {str(file)!r}, which cannot be read "
        f"({type(error).__name__}: {first_line}). Fetch it anew."
    )


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
