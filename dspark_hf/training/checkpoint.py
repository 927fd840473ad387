"""Checkpoints of a training run: the newest one that is whole."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_FOLDER = re.compile(r"checkpoint-(\d+)")
# Trainer writes it last
_LAST_FILE = "trainer_state.json"


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None; remove newer ones that a crash left half-written."""
    folders = {
        int(match[1]): path for path in output_dir.glob("checkpoint-*") if (match := _FOLDER.fullmatch(path.name))
    }
    for step in sorted(folders, reverse=True):
        if (folders[step] / _LAST_FILE).is_file():
            return folders[step]
        shutil.rmtree(folders[step])
    return None
