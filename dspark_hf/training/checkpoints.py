"""The folder of a training run: whose it is, and where the run goes on."""

from __future__ import annotations

import inspect
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.utils import logging

from dspark_hf.damage import index_files, read_object, weights_damage
from dspark_hf.modeling.configuration_dspark import DSparkConfig

logger = logging.get_logger(__name__)

RESULT = "drafter"

_FOLDER = re.compile(r"checkpoint-(\d+)")
_CONFIG, _STATE = "config.json", "trainer_state.json"
# fields of the state that may be None, and their kinds otherwise
_OPTIONAL = {
    "best_metric": (int, float),
    "best_global_step": int,
    "best_model_checkpoint": str,
    "train_batch_size": int,
}
# what a run may learn of its drafter, or be told otherwise, and still be the same run
_OPEN_FIELDS = {
    "accept_rates",
    "base_model_name_or_path",
    "initializer_range",
    "markov_top_k",
    "num_target_layers",
    "sts_temperatures",
    "target_fingerprint",
}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def check_output(output_dir: Path) -> None:
    """Raise a `ValueError` if a run into this folder would write over, or clear away, what no run of ours has made.

    `Trainer` removes old folders that are named `checkpoint-*`, whoever made them.
    """
    for path in [*sorted(output_dir.glob("checkpoint-*")), output_dir / RESULT]:
        if (path.exists() or path.is_symlink()) and not is_own(path):
            raise ValueError(
                f"`--output` must be a folder that only training writes to, got {str(path)!r} in it, which is no "
                "drafter's. Name another folder, or move that one away."
            )


def check_same_drafter(output_dir: Path, config: DSparkConfig) -> None:
    """Raise a `ValueError` if a run that goes on in this folder would train another drafter than its checkpoints hold.

    Weights of other shapes do not fit, and those of the same shapes may have learned to read other layers.
    """
    names = [name for name in inspect.signature(DSparkConfig).parameters if name not in _OPEN_FIELDS]
    # written and read, as those of the checkpoints are
    wanted = _fields(json.loads(config.to_json_string()))
    for folder in sorted(output_dir.glob("checkpoint-*")):
        try:
            held = _fields(read_object(folder / _CONFIG))
        except (ValueError, TypeError):
            # damaged: nothing goes on from it
            continue
        other = [f"`{name}` {held[name]}" for name in names if name in held and held[name] != wanted[name]]
        if other:
            raise ValueError(
                f"`--output` must be a folder in which the same drafter was trained, got one with {', '.join(other)} "
                f"in {str(folder)!r}. Give the options of that run again, or name another folder for this one."
            )


def _fields(written: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that was `written` without its defaults."""
    fields: dict[str, Any] = json.loads(DSparkConfig.from_dict(written).to_json_string(use_diff=False))
    return fields


def is_own(folder: Path) -> bool:
    """Return whether a folder is a saved drafter, or what a crash at the very start of saving one leaves."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return read_object(folder / _CONFIG).get("model_type") == DSparkConfig.model_type
    except ValueError:
        # the configuration is written first
        return {path.name for path in folder.iterdir()} <= {_CONFIG}


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None.

    Damaged ones are named in a warning and moved to `damaged-checkpoint-N`, where nothing looks for them.
    """
    newest = None
    found = [(int(match[1]), path) for path in output_dir.glob("*") if (match := _FOLDER.fullmatch(path.name))]
    for step, path in sorted(found):
        damage = checkpoint_damage(path, step)
        if damage is None:
            newest = path
        elif is_own(path):
            aside = _free_name(path.with_name(f"damaged-{path.name}"))
            path.rename(aside)
            logger.warning(f"Passed over the checkpoint {path}, now {aside.name}: {damage}.")
    return newest


def checkpoint_damage(folder: Path, step: int) -> str | None:
    """Return what is wrong with a checkpoint, in words, or None if it is whole.

    `Trainer` writes `trainer_state.json` last, but none of its files at once: each may be cut, or empty.
    """
    try:
        state = read_object(folder / _STATE)
        _check_state(state, step)
    except ValueError as error:
        return f"`{_STATE}` {error}"
    name = _INDEX if (folder / _INDEX).exists() else _WEIGHTS
    try:
        names = index_files(folder / _INDEX) if name == _INDEX else [_WEIGHTS]
    except ValueError as error:
        return f"`{_INDEX}` {error}"
    for name in names:
        if (damage := weights_damage(folder / name)) is not None:
            return f"`{name}` {damage}"
    # the optimiser, the schedule and the random numbers
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        if not path.is_file() or not zipfile.is_zipfile(path):
            return f"`{path.name}` is cut or empty"
    return None


def _check_state(state: dict, step: int) -> None:
    known = vars(TrainerState())
    if unknown := sorted(state.keys() - known.keys()):
        raise ValueError(f"holds {unknown[0]!r:.60}, which is unknown")
    for name, value in state.items():
        if not _fits(value, known[name], _OPTIONAL.get(name)):
            raise ValueError(f"holds {value!r:.60} as {name!r}")
    if not all(isinstance(record, dict) for record in state.get("log_history", [])):
        raise ValueError("holds a log whose entries are no objects")
    if state.get("global_step") != step:
        raise ValueError(f"is of step {state.get('global_step')!r:.60}")


def _fits(value: Any, default: Any, optional: Any) -> bool:
    if default is None:
        return value is None or optional is None or isinstance(value, optional)
    if isinstance(default, bool) or isinstance(value, bool):
        return type(value) is type(default)
    # numbers of either kind
    return isinstance(value, (int, float) if isinstance(default, int) else type(default))


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
