"""What an evaluation measures, on disk as it comes: a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dspark_hf.evaluation.records import Answer, RoundRecord
from dspark_hf.evaluation.settings import EvaluationSettings
from dspark_hf.journal import InUseError, Journal
from dspark_hf.provenance import describe_run

# what one prompt, or one batch of them, was answered: one list per variant, one answer per repeat
Trial = dict[str, list[Answer]]
# set, temperature, whether a batch, number
TrialKey = tuple[str, float, bool, int]


class Recording:
    """A file of trials in an evaluation's folder, `measured-KEY.jsonl`, open for writing.

    The key follows from all that decides the numbers, so that trials of another evaluation are never found.

    Args:
        folder: the evaluation's.
        description: models, prompts and settings, as JSON can hold them.

    Raises:
        ValueError: if another run writes to it, or it is damaged; the message names the file.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]):
        digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()
        self.path = folder / f"measured-{digest[:12]}.jsonl"
        self._trials: dict[TrialKey, Trial] = {}
        try:
            self._journal = Journal(self.path, self._check)
        except InUseError as error:
            raise ValueError(str(error)) from error
        self._journal.records.clear()

    def __len__(self) -> int:
        return len(self._trials)

    def get(self, key: TrialKey) -> Trial | None:
        """Return a trial that was measured before, or None."""
        return self._trials.get(key)

    def add(self, key: TrialKey, trial: Trial) -> None:
        """Write a trial; from here on a killed process loses it no more."""
        answers = {variant: [asdict(answer) for answer in some] for variant, some in trial.items()}
        self._journal.append({"turn": list(key), "answers": answers})

    def close(self) -> None:
        """Let other runs have the file."""
        self._journal.close()

    def discard(self) -> None:
        """Remove the file: the evaluation is written."""
        self._journal.discard()

    def _check(self, record: dict[str, Any], number: int) -> None:
        try:
            name, temperature, is_batch, index = record["turn"]
            key = (str(name), _number(temperature), bool(is_batch), _count(index))
            self._trials[key] = {
                str(variant): [_answer(answer) for answer in some] for variant, some in record["answers"].items()
            }
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"`{self.path}` must hold answers on every line, got something else on line {number}. Remove the "
                "line, or the file to measure anew."
            ) from error


def _answer(fields: Mapping[str, Any]) -> Answer:
    rounds = fields["rounds"]
    return Answer(
        token_ids=tuple(tuple(_count(token_id) for token_id in row) for row in fields["token_ids"]),
        seconds=_number(fields["seconds"]),
        rounds=None if rounds is None else tuple(_round(one) for one in rounds),
    )


def _round(fields: Mapping[str, Any]) -> RoundRecord:
    confidence = fields["confidence"]
    return RoundRecord(
        num_drafted=_count(fields["num_drafted"]),
        num_verified=_count(fields["num_verified"]),
        num_accepted=_count(fields["num_accepted"]),
        num_committed=_count(fields["num_committed"]),
        confidence=None if confidence is None else tuple(float(one) for one in confidence),
    )


def _count(value: Any) -> int:
    # a truth value is no number
    if type(value) is not int or value < 0:
        raise ValueError("no count")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError("no number")
    return float(value)


def describe(
    target: Any, folders: Mapping[str, str], sets: Mapping[str, Sequence[Tensor]], settings: EvaluationSettings
) -> dict[str, Any]:
    """Return all that decides what an evaluation measures.

    Args:
        target: the model that answers.
        folders: folders or hub names of the target and the drafters, by what they are called.
        sets: every set's prompts, token ids `(1, T)` each.
        settings: how to measure.
    """
    run = describe_run(is_on_cpu=target.device.type == "cpu")
    prompts = {name: [token_ids.tolist() for token_ids in some] for name, some in sets.items()}
    return {
        "models": {name: [folder, _files(Path(folder))] for name, folder in folders.items()},
        "dtype": str(target.dtype),
        "device": str(target.device),
        "prompts": hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest(),
        "settings": asdict(settings),
        # not the day, and not how the command was spelt
        "run": [run.hardware, run.num_threads, run.versions, run.commit],
    }


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Return what tells that a folder's files are no longer the same: names, sizes, times."""
    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if path.is_file()]
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
