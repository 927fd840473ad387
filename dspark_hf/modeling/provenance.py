"""Whose drafter it is: the target's name and a fingerprint of it, and a word if it seems to be another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.configuration_dspark import DSparkConfig

_NUM_ROWS = 16
# first drafts that are looked at, and the share of them below which nearly nothing is accepted: drafters of use
# accept more than a half, those of another model hardly one
_NUM_JUDGED = 24
_NEXT_TO_NOTHING = 0.1


def target_fields(target: TargetAdapter) -> dict[str, str | None]:
    """Return the fields of `DSparkConfig` that name a target."""
    name = getattr(target.model.config, "name_or_path", None)
    return {"base_model_name_or_path": name or None, "target_fingerprint": fingerprint(target)}


def fingerprint(target: TargetAdapter) -> str | None:
    """Return a short hash of a target's sizes and of some rows of its embedding, or None if they are out of reach.

    Loaded in another dtype or with its layers quantised, a target keeps its fingerprint; a fine-tune that trains the
    embedding has another one. Where weights are stored in fp32, fp16 rounds them before they are looked at, and has
    a fingerprint of its own.
    """
    weight = getattr(target.model.get_input_embeddings(), "weight", None)
    # no process has all of what tensor parallelism divided, and to gather it all would have to ask at once
    is_divided = hasattr(weight, "full_tensor")
    if weight is None or weight.is_meta or is_divided or not weight.is_floating_point():
        return None
    rows = torch.linspace(0, target.vocab_size - 1, _NUM_ROWS, device="cpu").long().to(weight.device)
    with torch.no_grad():
        # what released weights are stored in, so that a target read as fp32 stays the same
        values = weight[rows].to(device="cpu", dtype=torch.bfloat16).contiguous()
    sizes = f"{target.vocab_size}, {target.hidden_size}, {target.num_layers}"
    return hashlib.sha256(sizes.encode() + values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


class Acquaintance:
    """What the first rounds of a drafter tell of whether it was made for its target."""

    def __init__(self) -> None:
        self._num_verified = 0
        self._num_accepted = 0

    def judge(self, config: DSparkConfig, target: TargetAdapter, statistics: SpeculationStatistics) -> str | None:
        """Count the first drafts of a call; return a warning once they are many, bad, and the target is another."""
        if self._num_verified >= _NUM_JUDGED or not statistics.verified_by_position:
            return None
        self._num_verified += statistics.verified_by_position[0]
        self._num_accepted += statistics.accepted_by_position[0]
        if self._num_verified < _NUM_JUDGED or self._num_accepted > _NEXT_TO_NOTHING * self._num_verified:
            return None
        return _describe_mismatch(config, target, f"{self._num_accepted} of its first {self._num_verified} drafts")


def _describe_mismatch(config: DSparkConfig, target: TargetAdapter, accepted: str) -> str | None:
    made_for, given = config.base_model_name_or_path, getattr(target.model.config, "name_or_path", None)
    if config.target_fingerprint is not None:
        found = fingerprint(target)
        is_another = found is not None and found != config.target_fingerprint
    else:
        # names of folders and of the hub agree in their last part at best
        is_another = bool(made_for and given) and Path(str(made_for)).name.lower() != Path(str(given)).name.lower()
    if not is_another:
        return None
    return (
        f"`assistant_model` was made for {made_for or 'another target'}, not for {given or 'this one'}, and only "
        f"{accepted} were accepted: the text is right, but slower than without it. Load the drafter of this target."
    )
