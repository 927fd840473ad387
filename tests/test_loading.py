"""What a command names is loaded, or the message names the option, the file and what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dspark_hf.cli.demo import demo
from dspark_hf.demo.tiny import write_tiny_pair
from dspark_hf.loading import load_drafter, load_target, read_drafter_config

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target and its drafter."""
    folder = tmp_path_factory.mktemp("pair")
    write_tiny_pair(folder)
    return folder


def _damaged(pair: Path, tmp_path: Path, name: str, content: Any) -> Path:
    shutil.copytree(pair, tmp_path / "pair")
    for folder in ("target", "drafter"):
        path = tmp_path / "pair" / folder / name
        whole = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        if content == "pipe":
            os.mkfifo(path)
        elif content is not None:
            path.write_bytes(content(whole) if callable(content) else content)
    return tmp_path / "pair"


DAMAGES = [
    pytest.param("model.safetensors", lambda whole: whole[:-40], "holds no whole safetensors", id="cut"),
    pytest.param("model.safetensors", b"", "is empty", id="empty"),
    pytest.param("model.safetensors", LFS, "is a Git LFS pointer", id="pointer"),
    pytest.param("model.safetensors", b"<!DOCTYPE html>", "is a web page", id="page"),
    pytest.param("config.json", b"", "is empty", id="no configuration"),
    pytest.param("config.json", b"{" * 9, "holds no JSON", id="no JSON"),
    pytest.param("config.json", b"[" * 100_000, "too deep", id="deep JSON"),
    pytest.param("config.json", b"[1]", "holds no JSON object", id="a list"),
    pytest.param("config.json", b'{"a": "\xff"}', "holds the byte 0xff", id="no UTF-8"),
    pytest.param("model.safetensors.index.json", b"{}", "holds no `weight_map`", id="no map"),
    pytest.param(
        "model.safetensors.index.json",
        json.dumps({"weight_map": {"a": "../../secret"}}).encode(),
        "names '../../secret', which is no file in its folder",
        id="a path upwards",
    ),
    pytest.param(
        "model.safetensors.index.json",
        json.dumps({"weight_map": {"a": "other.safetensors"}}).encode(),
        "other.safetensors', which is no file",
        id="a missing part",
    ),
    pytest.param(
        "config.json",
        "pipe",
        "is no file",
        id="a pipe",
        marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here"),
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGES)
@pytest.mark.parametrize(
    ("option", "load"), [("--target", load_target), ("--drafter", load_drafter)], ids=["target", "drafter"]
)
def test_a_damaged_file_is_named(
    option: str, load: Any, name: str, content: Any, message: str, pair: Path, tmp_path: Path
) -> None:
    """The usual broken download ends in a stack of calls that names no file."""
    folder = _damaged(pair, tmp_path, name, content) / option.strip("-")
    with pytest.raises(ValueError, match="must be a folder of whole files") as failure:
        load(str(folder))
    assert f"`{option}`" in str(failure.value) and message in str(failure.value)


def test_weights_of_another_configuration_are_named(pair: Path, tmp_path: Path) -> None:
    """Transformers' error speaks of an option of its own, and says which tensors in the log alone."""
    wider = json.loads((pair / "drafter" / "config.json").read_text()) | {"intermediate_size": 40}
    folder = _damaged(pair, tmp_path, "config.json", lambda whole: json.dumps(json.loads(whole) | wider).encode())
    with pytest.raises(ValueError, match="`--drafter` must be the folder or hub name of a DSpark drafter, got"):
        load_drafter(str(folder / "drafter"))


def test_what_is_whole_is_loaded(pair: Path) -> None:
    """All of this refuses what is right."""
    load_target(str(pair / "target"), device="cpu")
    assert load_drafter(str(pair / "drafter")).config == read_drafter_config(str(pair / "drafter"))


@pytest.mark.parametrize("drafter", ["{pair}/nope", "{pair}/target"])
def test_the_demo_says_what_is_no_drafter(drafter: str, pair: Path) -> None:
    """A typing error shows a dozen frames of other people's code, after a minute of converting weights."""
    app = typer.Typer()
    app.command()(demo)
    arguments = ["--target", str(pair / "target"), "--drafter", drafter.format(pair=pair)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "500"})
    assert result.exit_code == 2
    assert "`--drafter` must be the folder or hub name of a DSpark drafter" in result.output
