"""Which drafters are known: those that the package names, and the user's own.

A registry file holds `{"drafters": [{"target": ..., "drafter": ..., "fingerprint": ...}, ...]}`. `target` is the hub
name or folder of a target, `drafter` the hub name or folder of its drafter (a folder that begins with a dot is seen
from the file), `fingerprint` tells the target from others of its name and may be left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants
from transformers.utils import logging

from dspark_hf.damage import read_object
from dspark_hf.files import write_whole

DRAFTERS_VARIABLE = "DSPARK_HF_DRAFTERS"
FILE_NAME = "drafters.json"
_PACKAGE_FILE = Path(__file__).with_name(FILE_NAME)
_FIELDS = ("target", "drafter", "fingerprint")
_LOGGER = logging.get_logger(__name__)


@dataclass(frozen=True)
class DrafterEntry:
    """A drafter and the target that it was made for.

    Args:
        target: hub name or folder of the target.
        drafter: hub name or folder of the drafter.
        fingerprint: what tells the target from others of its name (`modeling/provenance.py`), or None.
        origin: the file that says so.
    """

    target: str
    drafter: str
    fingerprint: str | None = None
    origin: str = ""


def own_place() -> Path:
    """Return the folder of the user's drafters, or the registry file: what `DSPARK_HF_DRAFTERS` says, else in HF_HOME.

    A folder holds drafters' folders, which say themselves whose they are, and perhaps a file `drafters.json`.
    """
    given = os.environ.get(DRAFTERS_VARIABLE)
    return Path(given).expanduser() if given else Path(constants.HF_HOME, "dspark_hf", "drafters")


def known_drafters() -> list[DrafterEntry]:
    """Return all entries, those that count first at the front: the user's file, folders, then the package's own.

    Raises:
        ValueError: if a registry file is damaged, or `DSPARK_HF_DRAFTERS` names nothing; the message names it.

    Example:

        >>> from dspark_hf.registry.entries import known_drafters
        >>> [entry.drafter for entry in known_drafters() if entry.target == "Qwen/Qwen3-4B"]
        ['deepseek-ai/dspark_qwen3_4b_block7']
    """
    place = own_place()
    if (
        DRAFTERS_VARIABLE in os.environ
        and os.environ[DRAFTERS_VARIABLE]
        and not place.exists()
        and not _is_file(place)
    ):
        raise ValueError(
            f"`{DRAFTERS_VARIABLE}` must name a folder of drafters or a registry file, got {str(place)!r}, which is "
            "not there. Correct or unset it."
        )
    file = place if _is_file(place) else place / FILE_NAME
    own = read_registry(file) if file.exists() else []
    found = [] if _is_file(place) or not place.is_dir() else _scan(place)
    # what the package says of folders holds in a clone of the repository alone
    shipped = [entry for entry in read_registry(_PACKAGE_FILE) if not _is_absent_folder(entry.drafter)]
    return [*own, *found, *shipped]


def _is_file(place: Path) -> bool:
    return place.suffix == ".json"


def _is_absent_folder(name: str) -> bool:
    # in a source archive a folder holds the drafter's card alone
    return os.path.isabs(name) and not os.path.isfile(os.path.join(name, "config.json"))


def read_registry(file: Path) -> list[DrafterEntry]:
    """Return the entries of a registry file.

    Raises:
        ValueError: if it is damaged; the message names file, rule and remedy.
    """
    try:
        fields = read_object(file)
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    entries = fields.get("drafters")
    if not isinstance(entries, list):
        raise _damaged(file, 'has no list "drafters"')
    return [_read_entry(entry, file) for entry in entries]


def _read_entry(entry: Any, file: Path) -> DrafterEntry:
    if not isinstance(entry, dict) or not set(entry) <= set(_FIELDS):
        raise _damaged(file, f"holds the entry {entry!r:.120}, which has other fields than {', '.join(_FIELDS)}")
    for name in _FIELDS:
        value = entry.get(name)
        if not (isinstance(value, str) and value) and not (name == "fingerprint" and value is None):
            raise _damaged(file, f"holds an entry whose {name} is {value!r:.60}, no name")
    drafter = entry["drafter"]
    if drafter.startswith("."):
        drafter = str((file.parent / drafter).resolve())
    return DrafterEntry(entry["target"], os.path.expanduser(drafter), entry.get("fingerprint"), str(file))


def _damaged(file: Path, damage: str) -> ValueError:
    return ValueError(
        f"`{DRAFTERS_VARIABLE}` must lead to whole files of drafters, got {str(file)!r}, which {damage}. Mend or "
        "delete it; `dspark_hf.register_drafter` writes it anew."
    )


def _scan(place: Path) -> list[DrafterEntry]:
    """Return what the drafters' folders in `place` say of themselves."""
    entries = []
    for config in sorted(place.glob("*/config.json")):
        try:
            fields = read_object(config)
        except ValueError as error:
            # one damaged folder does not hide the others
            _LOGGER.warning_once(f"`{DRAFTERS_VARIABLE}`: {str(config)!r} is left out, it {error}.")
            continue
        target, print_ = fields.get("base_model_name_or_path"), fields.get("target_fingerprint")
        if fields.get("model_type") == "dspark" and (target or print_):
            entries.append(DrafterEntry(target or "", str(config.parent), print_, str(config)))
    return entries


def add_entry(entry: DrafterEntry) -> Path:
    """Put an entry into the user's registry file, before the others, and return the file.

    An entry with the same drafter and target is replaced.

    Raises:
        ValueError: if the file that is there is damaged.
    """
    place = own_place()
    file = place if _is_file(place) else place / FILE_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    # two processes may register at once
    with FileLock(f"{file}.lock"):
        others = read_registry(file) if file.exists() else []
        others = [one for one in others if (one.target, one.drafter) != (entry.target, entry.drafter)]
        written = [{name: asdict(one)[name] for name in _FIELDS if asdict(one)[name]} for one in (entry, *others)]
        write_whole(file, (json.dumps({"drafters": written}, indent=2) + "\n").encode())
    return file
