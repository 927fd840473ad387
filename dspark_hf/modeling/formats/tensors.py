"""Which tensors a checkpoint holds, and the tensors themselves, from folders and from the hub."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from dspark_hf.damage import first_line, read_weight_map, weights_damage

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


def read_index(
    name_or_path: str | os.PathLike,
    prefix: str = "",
    *,
    is_left_out: Callable[[str], bool] | None = None,
    **hub_options: Any,
) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint whose names begin with `prefix`, without reading them.

    Args:
        name_or_path: folder or hub name.
        prefix: of the tensors' names in the files.
        is_left_out: which of those names are not wanted.
        hub_options: as in Transformers. Only files that hold a wanted tensor are fetched, or need to be there, by the
            checkpoint's own index.

    Raises:
        ValueError: if there are no safetensors files, none with such a tensor, or a file is damaged.
    """

    def is_wanted(name: str) -> bool:
        return name.startswith(prefix) and not (is_left_out is not None and is_left_out(name))

    infos: dict[str, TensorInfo] = {}
    for file in _files(name_or_path, is_wanted, hub_options):
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if is_wanted(name):
                    part = tensors.get_slice(name)
                    infos[name] = TensorInfo(_dtype(part.get_dtype(), name, file), tuple(part.get_shape()), file)
    if not infos:
        raise ValueError(
            f"`pretrained_model_name_or_path` must hold tensors {prefix + '*'!r} in safetensors files, got none in "
            f"{str(name_or_path)!r}. Check the name, or fetch the missing files."
        )
    return infos


def read_names(name_or_path: str | os.PathLike, **hub_options: Any) -> list[str]:
    """Return the names of a checkpoint's tensors; its index is enough, the files need not be there.

    Raises:
        ValueError: if the index, or the only file, is damaged.
    """
    options = known_options(hub_options)
    index = cached_file(name_or_path, INDEX_NAME, _raise_exceptions_for_missing_entries=False, **options)
    if index is not None:
        return list(_weight_map(Path(index)))
    return list(read_index(name_or_path, **hub_options))


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ValueError: if it is absent, damaged, or something else in such a file's place; the message names the file.
    """
    # neither a folder nor a pipe, which would be waited for
    if not file.is_file():
        raise _not_whole(file, "is no file")
    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _not_whole(file, weights_damage(file) or first_line(error)) from error
    with opened as tensors:
        yield tensors


def _not_whole(file: Path, problem: str) -> ValueError:
    return ValueError(
        f"`pretrained_model_name_or_path` must hold whole files, got {str(file)!r}, which {problem}. "
        "Fetch that file again."
    )


def _dtype(stored: str, name: str, file: Path) -> torch.dtype:
    if stored not in _DTYPES:
        raise ValueError(
            f"`{name}` must be stored as one of {', '.join(_DTYPES)}, got {stored} in {str(file)!r}. Take a "
            "checkpoint in the released formats."
        )
    return _DTYPES[stored]


def _files(
    name_or_path: str | os.PathLike,
    is_wanted: Callable[[str], bool],
    hub_options: dict[str, Any],
    names: tuple[str, str] = _NAMES[0],
) -> list[Path]:
    options = known_options(hub_options)
    index_name, single_name = names
    index = cached_file(name_or_path, index_name, _raise_exceptions_for_missing_entries=False, **options)
    if index is None:
        single = cached_file(name_or_path, single_name, _raise_exceptions_for_missing_entries=False, **options)
        return [] if single is None else [Path(single).absolute()]
    files = sorted({file for name, file in _weight_map(Path(index)).items() if is_wanted(name)})
    return [Path(str(cached_file(name_or_path, file, **options))).absolute() for file in files]


def read_shapes(name_or_path: str | os.PathLike, **hub_options: Any) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a checkpoint's tensors, in safetensors or `.bin` files, sharded or not.

    Raises:
        ValueError: if there are no such files, or one of them is damaged.
    """
    return {name: tuple(shape) for file in _any_files(name_or_path, hub_options) for name, shape in _shapes(file)}


def read_tensors(
    name_or_path: str | os.PathLike, is_wanted: Callable[[str], bool] = lambda name: True, **hub_options: Any
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors on the CPU, each as it is stored; of `.bin` files nothing but tensors is read.

    `is_wanted` tells by their names which ones.

    Raises:
        ValueError: if there are no such files, or one of them is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in _any_files(name_or_path, hub_options):
        held = _unpickled(file) if file.suffix == ".bin" else _mapped(file, is_wanted)
        tensors.update({name: x for name, x in held.items() if is_wanted(name)})
    return tensors


def find_file(name_or_path: str | os.PathLike, is_meant: Callable[[str], bool], **hub_options: Any) -> Path | None:
    """Return the file of a checkpoint that holds the tensor that `is_meant` tells by its name, None if none does.

    Raises:
        ValueError: if there are no files of tensors, or one of them is damaged.
    """
    path = Path(name_or_path)
    files = [path] if path.is_file() else _any_files(name_or_path, hub_options)
    # a file that is named itself is of a layout of its own
    return next((file for file in files if file == path or any(is_meant(name) for name, _ in _shapes(file))), None)


def _any_files(name_or_path: str | os.PathLike, hub_options: dict[str, Any]) -> list[Path]:
    for names in _NAMES:
        files = _files(name_or_path, lambda name: True, hub_options, names)
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
    with open_tensors(file) as tensors:
        return [(name, tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118 (not a dict)


def _mapped(file: Path, is_wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    with open_tensors(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys() if is_wanted(name)}  # noqa: SIM118 (not a dict)


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
    return ValueError(
        f"`pretrained_model_name_or_path` must hold whole files of tensors, got {str(file)!r}, which cannot be read "
        f"({type(error).__name__}: {first_line(error)}). Fetch it anew."
    )


def known_options(hub_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that say where a file is fetched from, and how."""
    return {name: value for name, value in hub_options.items() if name in HUB_OPTIONS and value is not None}


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of every tensor, as an index names them.

    Raises:
        ValueError: if it is no index, or names a file outside the checkpoint's folder.
    """
    try:
        return read_weight_map(index)
    except ValueError as error:
        raise _not_whole(index, str(error)) from error


def iterate_tensors(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name, file by file, each as it is stored.

    They are views of the mapped file: memory is filled as they are read, and only what is written to is copied.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(infos[name].file, []).append(name)
    for file, its_names in sorted(by_file.items()):
        with open_tensors(file) as tensors:
            for name in its_names:
                yield name, tensors.get_tensor(name)
