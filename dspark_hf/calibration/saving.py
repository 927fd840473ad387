"""Put temperatures into a saved drafter, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark_hf.damage import read_object
from dspark_hf.files import write_whole, write_whole_folder
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel

_CONFIG = "config.json"


def check_destination(drafter: str | Path, output: Path | None) -> None:
    """Raise a `ValueError` unless temperatures of `drafter` can be saved to `output`, or into `drafter` itself."""
    if output is not None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(
                f"`--output` must be a new or empty folder, got {str(output)!r}. Name another one, or leave it out to "
                "change the drafter's own folder."
            )
        return
    if not _is_own_layout(drafter):
        raise ValueError(
            f"`--output` must be given for a drafter that is no folder in dspark_hf's own layout, got none for "
            f"{str(drafter)!r}. Name a new folder for the calibrated drafter."
        )
    if not os.access(drafter, os.W_OK):
        raise ValueError(f"`--drafter` must be a folder you may write to, got {str(drafter)!r}. Give an `--output`.")


def save_temperatures(drafter: str | Path, temperatures: Sequence[float], output: Path | None = None) -> Path:
    """Set `sts_temperatures` of a saved drafter. Returns the folder that holds the calibrated drafter.

    Without `output` the drafter's own `config.json` is replaced at once by one that differs in this field only. With
    `output` that folder gets a copy of the drafter; there is a whole folder or none.

    Raises:
        ValueError: if `output` is not empty, or left out for a drafter that is no folder in our own layout, or if the
            temperatures are not one positive, finite number for each of the drafter's slots; nothing is written then.
    """
    check_destination(drafter, output)
    DSparkConfig.from_pretrained(drafter, sts_temperatures=list(temperatures))
    if output is None:
        _write_field(Path(drafter, _CONFIG), temperatures)
        return Path(drafter)
    if _is_own_layout(drafter):
        write_whole_folder(output, lambda folder: _copy(Path(drafter), folder, temperatures))
    else:
        write_whole_folder(output, lambda folder: _convert(drafter, folder, temperatures))
    return output


def _is_own_layout(drafter: str | Path) -> bool:
    path = Path(drafter, _CONFIG)
    return path.is_file() and _read(path).get("model_type") == DSparkConfig.model_type


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(
            f"`--drafter` must be a folder of whole files, got {str(path)!r}, which {error}. Fetch it again."
        ) from error


def _write_field(path: Path, temperatures: Sequence[float]) -> None:
    fields = {**_read(path), "sts_temperatures": list(temperatures)}
    # as Transformers writes it
    write_whole(path, (json.dumps(fields, indent=2) + "\n").encode())


def _copy(source: Path, folder: Path, temperatures: Sequence[float]) -> None:
    # links of a hub cache become files
    shutil.copytree(source, folder, ignore=_not_the_drafters, ignore_dangling_symlinks=True, dirs_exist_ok=True)
    _write_field(folder / _CONFIG, temperatures)


def _not_the_drafters(folder: str, names: list[str]) -> set[str]:
    """Return what is not copied: folders elsewhere that links lead to, and what is neither file nor folder."""
    paths = [Path(folder, name) for name in names]
    return {path.name for path in paths if not path.is_file() and (path.is_symlink() or not path.is_dir())}


def _convert(drafter: str | Path, folder: Path, temperatures: Sequence[float]) -> None:
    model = DSparkAssistantModel.from_pretrained(drafter, dtype="auto")
    model.config.sts_temperatures = list(temperatures)
    model.save_pretrained(folder)
