"""Files that are whole or absent: training checkpoints that a later run resumes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def write_whole(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`; a crash on the way leaves the previous file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_if_there(path: Path) -> dict[str, Any] | None:
    """Return the state in `path`, or None if there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
