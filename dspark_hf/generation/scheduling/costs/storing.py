"""Profiles on disk: readable JSON, one file per model, dtype, device and attention implementation."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path
from transformers.utils import logging

from dspark_hf.files import write_whole
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable, Point

logger = logging.get_logger(__name__)

FOLDER_VARIABLE = "DSPARK_HF_PROFILES"
_FORMAT = 1
_MAX_NAME = 200
# a grid of hundreds of points has some tens of kilobytes
_MAX_BYTES = 16 << 20
# more rows or tokens than any measurement has
_MAX_SIZE = 1 << 31


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
        name = "--".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in parts)
        if len(name) > _MAX_NAME:
            # file systems end names at 255 characters
            name = name[:_MAX_NAME] + "--" + hashlib.sha256(name.encode()).hexdigest()[:16]
        return name + ".json"


def profile_path(key: ProfileKey, folder: Path | None = None) -> Path:
    """Return where a target's profile is stored, whether there is one or not.

    Args:
        key: the target.
        folder: default: what `DSPARK_HF_PROFILES` names, else a folder in Hugging Face's assets cache.
    """
    return (folder or _default_folder()) / key.file_name


def load_profile(key: ProfileKey, drafter: str | None, folder: Path | None = None) -> CostTable | None:
    """Return what is stored of a target and one of its drafters, or None without a file that can be believed.

    A file that is there and is passed over is named in a warning: one that is damaged, and in the cache, which may be
    shared, one that somebody else has written or may write.
    """
    path = profile_path(key, folder)
    try:
        fields = _read(path)
        if fields is None:
            return None
        if folder is None and not os.environ.get(FOLDER_VARIABLE):
            _check_owner(path)
        draft = {} if drafter is None else fields["drafters"].get(drafter, {})
        table = CostTable(
            _curves(fields["verify"]["curves"], "seconds_by_width"),
            _curves(draft.get("curves", []), "seconds_by_drafts"),
        )
        doubt = table.doubt
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        # not what `save_profile` writes
        doubt = f"{type(error).__name__}: {error}"
    if doubt is None:
        return table
    logger.warning_once(
        f"Passed over the stored costs in {path}, which cannot be true ({doubt}). Delete that file, or replace "
        "it with `dspark-hf profile`."
    )
    return None


def save_profile(
    key: ProfileKey, drafter: str | None, table: CostTable, measured: Mapping[str, Any], folder: Path | None = None
) -> Path:
    """Write a profile, all of it or nothing, and return its path; other drafters' costs in the file stay.

    Args:
        key: the target.
        drafter: the drafter whose costs are in the table, or None.
        table: the costs; the target's replace those in the file.
        measured: where they come from: hardware, versions, date.
        folder: as in `profile_path`.

    Raises:
        OSError: if it cannot be written.
    """
    path = profile_path(key, folder)
    try:
        others = (_read(path) or {}).get("drafters")
    except ValueError:
        others = None
    drafters = dict(others) if isinstance(others, dict) else {}
    if drafter is not None:
        drafters[drafter] = {"measured": measured, "curves": _rows(table.draft, "seconds_by_drafts")}
    fields = {
        "format": _FORMAT,
        **asdict(key),
        "verify": {"measured": measured, "curves": _rows(table.verify, "seconds_by_width")},
        "drafters": drafters,
    }
    write_whole(path, (json.dumps(fields, indent=2) + "\n").encode())
    return path


def _default_folder() -> Path:
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else _cache_folder()


@lru_cache(maxsize=1)
def _cache_folder() -> Path:
    # cached because it makes the folder, and every call of generate asks for it
    return cached_assets_path("dspark_hf", namespace="profiles", subfolder="costs")


def _read(path: Path) -> dict[str, Any] | None:
    """Return what a file holds, or None if there is none.

    Raises:
        ValueError: if it is no profile of this format.
    """
    try:
        # never a pipe, which would be waited for
        if not path.is_file():
            return None
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError:
        return None
    if len(content) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES >> 20} MiB")
    try:
        fields = json.loads(content)
    except RecursionError as error:
        raise ValueError("JSON that is too deep") from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise ValueError(f"`format` must be {_FORMAT}")
    return fields


def _check_owner(path: Path) -> None:
    """Raise a `ValueError` if another user has written a file, or may write to it."""
    if os.name != "posix":
        return
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0):
        raise ValueError(f"another user's; {FOLDER_VARIABLE} can name its folder as one to trust")
    if status.st_mode & stat.S_IWOTH:
        raise ValueError("everybody may write to it")


def _rows(curves: CostCurves, name: str) -> list[dict[str, Any]]:
    grouped: dict[tuple[int, int], dict[str, float]] = {}
    for (rows, context, size), seconds in sorted(curves.points.items()):
        # a tenth of a microsecond is more than a clock can tell, and nothing takes no time
        grouped.setdefault((rows, context), {})[str(size)] = max(round(seconds, 7), 1e-7)
    return [{"rows": rows, "context": context, name: curve} for (rows, context), curve in grouped.items()]


def _curves(rows: list[dict[str, Any]], name: str) -> CostCurves:
    points: dict[Point, float] = {}
    for row in rows:
        for size, seconds in row[name].items():
            point = (_size(row["rows"]), _size(row["context"]), _size(size))
            points[point] = float(seconds)
    return CostCurves(points)


def _size(value: Any) -> int:
    size = int(value)
    if not 1 <= size <= _MAX_SIZE or isinstance(value, bool) or size != float(value):
        raise ValueError(f"{value!r:.40} rows or tokens")
    return size
