"""What a checkpoint holds, without reading or fetching more than needed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dspark_hf.modeling.formats import tensors as reading
from dspark_hf.modeling.formats.tensors import INDEX_NAME, iterate_tensors, read_index
from tests.modeling.deepseek_v4.checkpoints import assert_same_bytes, read_files


def test_every_tensor_as_stored(checkpoints):
    """A tensor is overlooked, or its dtype or shape is told wrongly."""
    infos, expected = read_index(checkpoints["fp4"]), read_files(checkpoints["fp4"])
    assert {name: (info.dtype, info.shape) for name, info in infos.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in expected.items()
    }
    assert_same_bytes(dict(iterate_tensors(infos, infos)), expected)


def test_each_file_is_opened_once(checkpoints, monkeypatch):
    """Loading opens a file of gigabytes for every tensor in it."""
    infos, opened = read_index(checkpoints["fp4"]), []
    original = reading.safe_open
    monkeypatch.setattr(reading, "safe_open", lambda file, **kwargs: opened.append(file) or original(file, **kwargs))
    list(iterate_tensors(infos, infos))
    assert sorted(opened) == sorted({info.file for info in infos.values()})


def test_tensors_are_views_of_the_file(checkpoints):
    """Keeping weights as stored copies them into memory."""
    infos = read_index(checkpoints["fp4"])
    tensors = dict(iterate_tensors(infos, infos))
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = [line.split()[0].split("-") for line in maps if str(checkpoints["fp4"]) in line]
    ranges = [(int(start, 16), int(end, 16)) for start, end in mapped]
    for name, tensor in tensors.items():
        assert any(start <= tensor.data_ptr() < end for start, end in ranges), name


def test_a_single_file(tmp_path):
    """A checkpoint small enough for one file has no index, and cannot be read."""
    save_file({"embed.weight": torch.ones(2, 3), "mtp.0.x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_index(tmp_path)["embed.weight"].shape == (2, 3)
    assert list(read_index(tmp_path, prefix="mtp.")) == ["mtp.0.x"]


def test_only_files_of_the_prefix_are_fetched(checkpoints, monkeypatch):
    """The drafter's few gigabytes are fetched with the hundreds of its target."""
    fetched = []

    def cached_file(name, file, **options):
        assert options.get("revision") == "main"
        assert name == "some/model"
        fetched.append(file)
        return str(checkpoints["fp4"] / file)

    monkeypatch.setattr(reading, "cached_file", cached_file)
    infos = read_index("some/model", prefix="mtp.", revision="main", unknown=1)
    weight_map = json.loads((checkpoints["fp4"] / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
    wanted = {name: file for name, file in weight_map.items() if name.startswith("mtp.")}
    assert infos.keys() == wanted.keys()
    assert sorted(fetched) == sorted({INDEX_NAME, *wanted.values()})


def test_nothing_to_read(tmp_path):
    """A folder without weights gives an empty model instead of an error."""
    with pytest.raises(ValueError, match="must hold tensors"):
        read_index(tmp_path)
