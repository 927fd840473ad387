"""Temperatures reach the saved drafter, and nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.calibration import saving
from dspark_hf.calibration.saving import check_destination, save_temperatures
from dspark_hf.demo.tiny import write_tiny_pair
from tests.modeling.deepspec_layout import BLOCK_SIZE, Layout, write_deepspec

TEMPERATURES = [1.5, 1.25, 1.0, 0.9, 0.8, 0.7, 0.6]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pair(tmp_path_factory.mktemp("pair"))[1]


@pytest.fixture
def drafter(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "drafter")


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_only_the_temperatures_change(original, drafter):
    """A field the drafter needs is lost, rounded or moved, or a temporary file stays behind."""
    assert save_temperatures(drafter, TEMPERATURES) == drafter
    before, after = _contents(original), _contents(drafter)
    old, new = json.loads(before.pop("config.json")), json.loads(after.pop("config.json"))
    assert before == after
    assert list(old) == list(new)
    assert {**old, "sts_temperatures": TEMPERATURES} == new
    # as Transformers would write it
    config = DSparkAssistantModel.from_pretrained(drafter).config
    text = (drafter / "config.json").read_text(encoding="utf-8")
    config.save_pretrained(drafter / "again")
    assert json.loads((drafter / "again" / "config.json").read_text(encoding="utf-8")) == json.loads(text)
    assert config.sts_temperatures == TEMPERATURES


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("has_output", [True, False])
def test_no_other_numbers_reach_a_drafter(original, drafter, tmp_path, value, has_output):
    """A failed fit writes NaN, which is no JSON, into a drafter that worked."""
    output = tmp_path / "calibrated" if has_output else None
    with pytest.raises(ValueError, match="`sts_temperatures` must be 7 positive numbers"):
        save_temperatures(drafter, [*TEMPERATURES[:-1], value], output)
    assert _contents(drafter) == _contents(original)
    assert not (tmp_path / "calibrated").exists()


def test_another_folder_gets_the_whole_drafter(original, drafter, tmp_path):
    """The calibrated drafter lacks a file, or the original was changed."""
    output = tmp_path / "deep" / "calibrated"
    assert save_temperatures(drafter, TEMPERATURES, output) == output
    assert _contents(drafter) == _contents(original)
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in original.iterdir())
    assert (output / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
    assert DSparkAssistantModel.from_pretrained(output).config.sts_temperatures == TEMPERATURES
    assert [path.name for path in output.parent.iterdir()] == ["calibrated"]


def test_links_of_a_hub_cache_stay_what_they_point_to(original, drafter, tmp_path):
    """The cached file of a hub model, which is named by its content, is changed."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in drafter.iterdir():
        (linked / path.name).symlink_to(path)
    save_temperatures(linked, TEMPERATURES)
    save_temperatures(linked, TEMPERATURES, tmp_path / "copy")
    assert _contents(drafter) == _contents(original)
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())


def test_a_crash_leaves_the_drafter_as_it_was(original, drafter, monkeypatch, tmp_path):
    """A full disk at the wrong moment costs the drafter."""

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(saving.os, "fsync", fail)
    for output in (None, tmp_path / "output"):
        with pytest.raises(OSError, match="no space left"):
            save_temperatures(drafter, TEMPERATURES, output)
    assert _contents(drafter) == _contents(original)
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]


def test_released_layout_is_saved_in_ours(tmp_path):
    """A released drafter loses its temperatures: its configuration has no place for them."""
    folder, output = tmp_path / "released", tmp_path / "calibrated"
    write_deepspec(folder, Layout(dtype=torch.bfloat16))
    with pytest.raises(
        ValueError, match="`--output` must be given for a drafter that is no folder in dspark_hf's own"
    ):
        check_destination(folder, None)
    temperatures = TEMPERATURES[:BLOCK_SIZE]
    save_temperatures(folder, temperatures, output)
    old, new = (DSparkAssistantModel.from_pretrained(path, dtype="auto") for path in (folder, output))
    assert new.config.sts_temperatures == temperatures
    assert new.dtype == torch.bfloat16
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name])


def test_bad_destinations_are_refused(drafter, tmp_path):
    """Files of another model are overwritten or mixed with the drafter's."""
    with pytest.raises(ValueError, match="`--output` must be a new or empty folder"):
        check_destination(drafter, drafter)
    with pytest.raises(ValueError, match="`--output` must be a new or empty folder"):
        save_temperatures(drafter, TEMPERATURES, drafter / "config.json")
    with pytest.raises(ValueError, match="`--output` must be given .* 'org/name'"):
        check_destination("org/name", None)
    empty = tmp_path / "empty"
    empty.mkdir()
    check_destination(drafter, empty)
    save_temperatures(drafter, TEMPERATURES, empty)
    assert (empty / "config.json").is_file()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_only_the_drafters_own_is_copied(drafter, tmp_path):
    """Whatever a link in the folder leads to is copied along, or a link to itself ends in a stack of calls."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("secret")
    (elsewhere / "shared.txt").write_text("shared")
    (drafter / "linked").symlink_to(elsewhere)
    (drafter / "itself").symlink_to(drafter)
    (drafter / "nowhere").symlink_to(tmp_path / "nothing")
    # as in the cache of the hub
    (drafter / "shared.txt").symlink_to(elsewhere / "shared.txt")
    os.mkfifo(drafter / "pipe")
    (drafter / "notes").mkdir()
    (drafter / "notes" / "own").write_text("own")
    output = save_temperatures(drafter, TEMPERATURES, tmp_path / "calibrated")
    names = {str(path.relative_to(output)) for path in output.rglob("*")}
    assert not {"linked", "itself", "nowhere", "pipe"} & names
    assert {"notes/own", "shared.txt", "config.json", "model.safetensors"} <= names
    assert not (output / "shared.txt").is_symlink()
