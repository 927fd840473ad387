"""How many of our files a reader has to open to follow one round."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import dspark_hf
from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.decoding import Rounds
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target

PACKAGE = Path(dspark_hf.__file__).parent
# the drafter: model, configuration, layers, rotation, heads, output head, its chain, and the draws of a slot and of a
# token; what it has read and the store of that; the target and its cache; the rows with their text, processors and
# stop rules; the schedule, and who drafts by it; lookups; acceptance; the record; and the interfaces between them
MOST_FILES = 27


def test_one_round_stays_in_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can follow a round of one row: it wanders through ever more files."""
    target = tiny_target()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    drafter.scheduler = "fixed"
    rounds: list[set[str]] = []
    original = Rounds.round

    def watched(self: Rounds) -> None:
        entered: set[str] = set()

        def note(frame: FrameType, event: str, argument: Any) -> None:
            path = Path(frame.f_code.co_filename)
            if event == "call" and PACKAGE in path.parents:
                entered.add(path.relative_to(PACKAGE).as_posix())

        sys.setprofile(note)
        try:
            original(self)
        finally:
            sys.setprofile(None)
        rounds.append(entered)

    monkeypatch.setattr(Rounds, "round", watched)
    target.generate(**ragged_prompts(1), max_new_tokens=12, do_sample=False, assistant_model=drafter)
    most = max(rounds, key=len)
    assert {"generation/decoding.py", "generation/verification.py", "modeling/modeling_dspark.py"} <= most
    assert len(most) <= MOST_FILES, sorted(most)
