"""Profiles on disk: readable JSON, one file per model, dtype, device and attention implementation."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

from dspark_hf.files import write_whole
from dspark_hf.profiling.table import CostCurves, CostTable, Point

FOLDER_VARIABLE = "DSPARK_HF_PROFILES"
_FORMAT = 1


@dataclass(frozen=True)
class ProfileKey:
    """What a target's costs depend on; `model` names its class and its sizes, not its weights."""

    model: str
    dtype: str
    device: str
    attention: str

    @property
    def file_name(self) -> str:
        """The name of its file."""
        parts = (self.model, self.dtype, self.device, self.attention)
        return "--".join(re.sub(r"[^A-Za-z0-9.]+", "-", part) for part in parts) + ".json"


def profile_folder(folder: Path | None = None) -> Path:
    """Return `folder`, else what `DSPARK_HF_PROFILES` names, else a folder in Hugging Face's assets cache."""
    if folder is not None:
        return folder
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else cached_assets_path("dspark_hf", namespace="profiles", subfolder="costs")


def load_profile(key: ProfileKey, drafter: str, folder: Path | None = None) -> CostTable | None:
    """Return what is stored of a target and one of its drafters, or None without a readable file."""
    fields = _read(profile_folder(folder) / key.file_name)
    if fields is None:
        return None
    return CostTable(
        _curves(fields["verify"], "seconds_by_width"),
        _curves(fields["drafters"].get(drafter, []), "seconds_by_drafts"),
    )


def save_profile(key: ProfileKey, drafter: str, table: CostTable, folder: Path | None = None) -> Path:
    """Write a profile, whole or not at all, and return its path; other drafters' costs in the file stay."""
    path = profile_folder(folder) / key.file_name
    fields = _read(path) or {"drafters": {}}
    fields = {
        "format": _FORMAT,
        "model": key.model,
        "dtype": key.dtype,
        "device": key.device,
        "attention": key.attention,
        "verify": _rows(table.verify, "seconds_by_width"),
        "drafters": {**fields["drafters"], drafter: _rows(table.draft, "seconds_by_drafts")},
    }
    write_whole(path, (json.dumps(fields, indent=2) + "\n").encode())
    return path


def _read(path: Path) -> dict[str, Any] | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # a file of another format is measured anew
    return fields if isinstance(fields, dict) and fields.get("format") == _FORMAT else None


def _rows(curves: CostCurves, name: str) -> list[dict[str, Any]]:
    grouped: dict[tuple[int, int], dict[str, float]] = {}
    for (rows, context, size), seconds in sorted(curves.points.items()):
        # a tenth of a microsecond is more than a clock can tell
        grouped.setdefault((rows, context), {})[str(size)] = round(seconds, 7)
    return [{"rows": rows, "context": context, name: curve} for (rows, context), curve in grouped.items()]


def _curves(rows: list[dict[str, Any]], name: str) -> CostCurves:
    points: dict[Point, float] = {}
    for row in rows:
        for size, seconds in row[name].items():
            points[row["rows"], row["context"], int(size)] = seconds
    return CostCurves(points)
