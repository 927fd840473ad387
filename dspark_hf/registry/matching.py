"""Whose drafter fits: by the target's fingerprint, else by its name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.provenance import fingerprint
from dspark_hf.registry.entries import DrafterEntry

# where huggingface_hub keeps what it fetched: .../models--AUTHOR--NAME/snapshots/COMMIT
_SNAPSHOT = re.compile(r"models--(.+?)[/\\]snapshots[/\\]")


def find_entry(target: Any, entries: Iterable[DrafterEntry]) -> DrafterEntry | None:
    """Return the first entry for `target`, or None.

    A fingerprint decides where an entry has one and the target lets it be taken; else names do. A target that was
    loaded from a folder may be called as the last part of the entry's name.
    """
    name = target_name(target)
    print_of_target = cache(lambda: fingerprint(TargetAdapter(target)))
    for entry in entries:
        found = None if entry.fingerprint is None else print_of_target()
        if found == entry.fingerprint if found is not None else _is_called(name, entry.target):
            return entry
    return None


def target_name(target: Any) -> str:
    """Return the hub name or the folder that a target was loaded from, or an empty string."""
    name = str(getattr(target.config, "name_or_path", "") or "")
    snapshot = _SNAPSHOT.search(name)
    return snapshot[1].replace("--", "/") if snapshot else name


def _is_called(name: str, entry_name: str) -> bool:
    if not name or not entry_name:
        return False
    if name.lower() == entry_name.lower():
        return True
    return os.path.isdir(name) and Path(name).resolve().name.lower() == Path(entry_name).name.lower()
