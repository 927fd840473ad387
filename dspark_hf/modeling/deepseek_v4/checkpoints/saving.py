"""A model's weights as a checkpoint with the released names, in shards, put in place when all are written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dspark_hf.modeling.deepseek_v4.checkpoints.loading import official_name
from dspark_hf.modeling.formats.deepseek_v4 import PREFIX
from dspark_hf.modeling.formats.tensors import INDEX_NAME, SINGLE_NAME, TensorInfo, iterate_tensors

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Saving:
    """One tensor to save: its official name, what it is, and how to get it when its shard is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the tensor as it is saved."""
        return self.get().detach().to("cpu", self.dtype).contiguous()


def model_savings(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None, stored_dtypes: Mapping[str, torch.dtype]
) -> list[Saving]:
    """Return a model's tensors, or those of `state_dict`, to save under their official names.

    Args:
        model: with the weights; some may be offloaded.
        state_dict: weights to take instead, by the model's own names.
        stored_dtypes: dtypes of the weights that are saved in another one than they are held in.
    """
    savings = []
    for own, held in (model.state_dict() if state_dict is None else state_dict).items():
        name = official_name(own)
        dtype = stored_dtypes.get(name, held.dtype)
        savings.append(Saving(name, dtype, tuple(held.shape), _getter(model, own, held)))
    return savings


def stored_savings(infos: Mapping[str, TensorInfo]) -> list[Saving]:
    """Return tensors of another checkpoint, to save as they are."""
    return [Saving(name, info.dtype, info.shape, _reader(infos, name)) for name, info in infos.items()]


def _reader(infos: Mapping[str, TensorInfo], name: str) -> Callable[[], Tensor]:
    return lambda: next(iterate_tensors(infos, [name]))[1]


def _getter(model: nn.Module, name: str, held: Tensor) -> Callable[[], Tensor]:
    return lambda: _offloaded(model, name) if held.is_meta else held


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """Return a weight that accelerate's hooks would fetch."""
    owner, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            return weights[leaf]
    raise ValueError(f"`{name}` must be loaded before it is saved, got a weight on the meta device. Load the model.")


def write_weights(folder: Path, savings: Iterable[Saving], max_shard_bytes: int) -> None:
    """Write one file, or shards of at most `max_shard_bytes` and their index (a DSpark module has its own)."""
    shards = _shards(list(savings), max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({saving.name: saving.read() for saving in shard}, folder / file, metadata={"format": "pt"})
        weight_map.update({saving.name: file for saving in shard})
    if len(shards) > 1:
        total = sum(saving.num_bytes for shard in shards for saving in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_NAME, index)


def _shards(savings: list[Saving], max_bytes: int) -> list[list[Saving]]:
    if sum(saving.num_bytes for saving in savings) <= max_bytes:
        return [savings]
    shards: list[list[Saving]] = [[]]
    size = 0
    for saving in savings:
        last = shards[-1]
        is_other = bool(last) and last[-1].name.startswith(PREFIX) != saving.name.startswith(PREFIX)
        if last and (is_other or size + saving.num_bytes > max_bytes):
            shards.append([])
            size = 0
        shards[-1].append(saving)
        size += saving.num_bytes
    return shards


def write_json(path: Path, content: Mapping) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then move its files to `folder` and drop the weights that were there.

    If `write` fails, `folder` is as it was. Files are replaced, never overwritten, so that a model whose weights are
    views of them can be saved over its own checkpoint.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # inside, which is surely the same file system and one that we may write to
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as workspace:
            write(Path(workspace))
            # the index and the configuration last, since they say what the rest is
            files = sorted(Path(workspace).iterdir(), key=lambda file: file.suffix == ".json")
            for file in files:
                os.replace(file, folder / file.name)
            for stale in _weight_files(folder) - {file.name for file in files}:
                (folder / stale).unlink()
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _weight_files(folder: Path) -> set[str]:
    names = {file.name for file in folder.glob("model-*-of-*.safetensors")}
    return names | {name for name in (SINGLE_NAME, INDEX_NAME) if (folder / name).exists()}
