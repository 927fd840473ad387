"""A drafter's file with a tensor of another size is named: file, tensor, and both shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_hf import DSparkAssistantModel
from dspark_hf.modeling.deepseek_v4.tiny import write_tiny_checkpoint
from dspark_hf.modeling.formats.tensors import INDEX_NAME
from tests.modeling.deepspec_layout import Layout, deepspec_fields, deepspec_weights
from tests.modeling.formats.layouts import specforge_fields, speculators_fields, without_vocabulary, write
from tests.tiny import tiny_target

WEIGHTS = deepspec_weights(Layout())
# of the last layer, from which no size is taken
WRONG = "layers.1.mlp.down_proj.weight"


def _ours(folder: Path) -> Path:
    drafter = DSparkAssistantModel.from_target(tiny_target(), num_hidden_layers=2, markov_rank=4)
    drafter.save_pretrained(folder)
    return folder


_PACKAGINGS: dict[str, Callable[[Path], Path]] = {
    "ours": _ours,
    "DeepSpec": lambda folder: write(folder, deepspec_fields(Layout()), WEIGHTS),
    "prefixed": lambda folder: write(folder, deepspec_fields(Layout()), {f"model.{n}": x for n, x in WEIGHTS.items()}),
    "speculators": lambda folder: write(folder, speculators_fields(), without_vocabulary(WEIGHTS)),
    "SpecForge": lambda folder: write(folder, specforge_fields(), without_vocabulary(WEIGHTS)),
}


def _cut(file: Path, name: str) -> None:
    """Let a tensor be one row shorter."""
    tensors = load_file(file)
    tensors[name] = tensors[name][:-1].clone()
    # the old one is mapped
    file.unlink()
    save_file(tensors, file, {"format": "pt"})


def _stored(file: Path) -> str:
    return next(name for name in load_file(file) if name.endswith(WRONG))


@pytest.mark.parametrize("packaging", _PACKAGINGS)
def test_a_tensor_of_another_size_is_named_with_its_file(packaging: str, tmp_path: Path) -> None:
    """A drafter whose later layers do not fit ends in an error of a library that names no file and no remedy."""
    file = _PACKAGINGS[packaging](tmp_path) / "model.safetensors"
    height, width = load_file(file)[_stored(file)].shape
    DSparkAssistantModel.from_pretrained(tmp_path)
    _cut(file, _stored(file))
    message = rf"got `{WRONG}` of \({height - 1}, {width}\) instead of \({height}, {width}\) in '{file}'\. "
    with pytest.raises(ValueError, match=message):
        DSparkAssistantModel.from_pretrained(tmp_path)


def test_of_several_files_the_one_that_is_wrong_is_named(tmp_path: Path) -> None:
    """A drafter in several files is fetched anew as a whole, for one tensor of one of them."""
    names = sorted(WEIGHTS)
    parts = {"a.safetensors": names[:-3], "b.safetensors": names[-3:]}
    write(tmp_path, deepspec_fields(Layout()), {}).joinpath("model.safetensors").unlink()
    for part, held in parts.items():
        save_file({name: WEIGHTS[name].contiguous() for name in held}, tmp_path / part)
    weight_map = {name: part for part, held in parts.items() for name in held}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    _cut(tmp_path / weight_map[WRONG], WRONG)
    with pytest.raises(ValueError, match=rf"`{WRONG}` of .* in '{tmp_path / weight_map[WRONG]}'"):
        DSparkAssistantModel.from_pretrained(tmp_path)


def test_a_quantised_matrix_of_another_size_is_named(tmp_path: Path) -> None:
    """A drafter in few bits whose words are too few is built, and fails without its file's name."""
    tensors: dict[str, Any] = without_vocabulary(WEIGHTS)
    module = WRONG.removesuffix(".weight")
    weight = tensors.pop(WRONG)[:-1]
    scale = weight.abs().amax(1, keepdim=True) / 448
    tensors[WRONG] = (weight / scale).to(torch.float8_e4m3fn)
    tensors[f"{module}.weight_scale"] = scale
    write(tmp_path, speculators_fields(), tensors)
    with pytest.raises(ValueError, match=rf"`{WRONG}` of .* in '{tmp_path / 'model.safetensors'}'"):
        DSparkAssistantModel.from_pretrained(tmp_path)


def test_a_stage_of_another_size_is_named_with_its_file(tmp_path: Path) -> None:
    """The module inside a DeepSeek-V4 checkpoint of a hundred files does not say which of them is wrong."""
    write_tiny_checkpoint(tmp_path)
    weight_map = json.loads((tmp_path / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
    name = max(name for name in weight_map if name.startswith("mtp.") and name.endswith("attn_norm.weight"))
    _cut(tmp_path / weight_map[name], name)
    with pytest.raises(ValueError, match=rf"`{name}` must have the shape .* in '{tmp_path / weight_map[name]}'"):
        DSparkAssistantModel.from_pretrained(tmp_path)
