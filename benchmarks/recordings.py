"""Drafts recorded behind every position of a text, and what a schedule makes of them at given costs.

Greedy text is the same however it is drafted, and so are the drafts behind a position: recorded once, they tell what
becomes of any schedule's rounds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

import torch

from benchmarks.loads import make_load
from dspark_hf.generation.drafting.interface import DraftedBlock, Drafter
from dspark_hf.generation.scheduling import Batch, CallInfo, RoundOutcome, Schedule, Scheduler
from dspark_hf.generation.scheduling.costs.table import CostTable

# rows of a batch that is recorded, and the context whose costs count
RECORDED_ROWS = 8
CONTEXT = 128
# share of the steps that another program makes so many times longer
DISTURBED, DISTURBANCE = 0.02, 2.5


@dataclass(frozen=True)
class Draft:
    """The block behind a position: how many of its drafts are right, and all their margins."""

    num_right: int
    margins: tuple[float, ...]


Text = Sequence[Draft]


class _Recorder(Scheduler, Schedule):
    """Draft whole blocks and verify nothing, so that every position is drafted behind."""

    wants_margins = True

    def __init__(self) -> None:
        self.token_ids: list[list[list[int]]] = []
        self.margins: list[list[list[float]]] = []

    def start(self, call: CallInfo) -> Schedule:
        return self

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        assert drafted.margins is not None
        self.token_ids.append(drafted.token_ids.tolist())
        self.margins.append(drafted.margins.tolist())
        return batch.cut(0)


def record(target: Any, drafter: Drafter, prompts: Sequence[torch.Tensor], length: int) -> list[Text]:
    """Return the blocks behind the first `length` tokens that the target writes after every prompt."""
    texts: list[Text] = []
    for start in range(0, len(prompts), RECORDED_ROWS):
        load = make_load(
            prompts[start : start + RECORDED_ROWS], 0, target.device, {"do_sample": False, "eos_token_id": None}
        )
        recorder = _Recorder()
        output = target.generate(
            load.token_ids,
            attention_mask=load.attention_mask,
            max_new_tokens=length + drafter.block_size + 1,
            assistant_model=drafter,
            scheduler=recorder,
            drafts="model",
            **load.options,
        )
        written = output[:, load.token_ids.shape[1] :].tolist()
        texts += [
            [
                Draft(_num_right(recorder.token_ids[position][row], text[position + 1 :]), tuple(margins[row]))
                for position, margins in enumerate(recorder.margins[:length])
            ]
            for row, text in enumerate(written)
        ]
    return texts


def _num_right(drafts: Sequence[int], text: Sequence[int]) -> int:
    pairs = enumerate(zip(drafts, text, strict=False))
    return next((index for index, (draft, token) in pairs if draft != token), len(drafts))


def fewer_right(texts: Sequence[Text], share: float, seed: int = 0) -> list[Text]:
    """Return the texts with so many of the blocks right as they were, and none of the drafts of the others."""
    draw = random.Random(seed)
    return [[one if draw.random() < share else Draft(0, one.margins) for one in text] for text in texts]


@dataclass
class Clock:
    """What steps take: their measured costs, with noise, and now and then a disturbance."""

    costs: CostTable
    noise: float
    draw: random.Random

    def verify_seconds(self, num_rows: int, width: int) -> float:
        """Return the seconds of a pass."""
        return self.costs.verify_seconds(num_rows, width, CONTEXT) * self._factor()

    def draft_seconds(self, num_rows: int, num_drafts: int) -> float:
        """Return the seconds of drafting."""
        return self.costs.draft_seconds(num_rows, num_drafts, CONTEXT) * self._factor() if num_drafts else 0.0

    def _factor(self) -> float:
        factor = exp(self.noise * self.draw.gauss(0, 1))
        return factor * DISTURBANCE if self.noise and self.draw.random() < DISTURBED else factor


@dataclass
class Written:
    """Tokens and seconds of a batch, and its rounds: drafts made, and drafts verified."""

    num_tokens: int = 0
    seconds: float = 0.0
    rounds: list[tuple[int, int]] = field(default_factory=list)


def replay(schedule: Schedule, texts: Sequence[Text], length: int, clock: Clock, max_drafts: int) -> Written:
    """Return what a batch of `length` tokens a row takes."""
    written = Written(len(texts))
    places = [(text, 0) for text in texts]
    is_behind = True
    while places:
        limits = tuple(max(min(max_drafts, length - place - 2), 0) for _, place in places)
        batch = Batch(limits, len(places), CONTEXT)
        num_drafts = schedule.num_drafts(batch)
        num_verified = [0] * len(places)
        if num_drafts:
            margins = torch.tensor([text[place].margins[:num_drafts] for text, place in places])
            drafted = DraftedBlock(torch.zeros(margins.shape, dtype=torch.long), None, None, margins)
            num_verified = schedule.admit(drafted, batch)
        accepted = [min(text[place].num_right, n) for (text, place), n in zip(places, num_verified, strict=True)]
        drafting = clock.draft_seconds(len(places), num_drafts)
        verifying = clock.verify_seconds(len(places), 1 + max(num_verified))
        is_typical = not (num_drafts and is_behind)
        schedule.observe(RoundOutcome(batch, num_drafts, num_verified, accepted, drafting, verifying, is_typical))
        is_behind = not num_drafts
        written.num_tokens += len(places) + sum(accepted)
        written.seconds += drafting + verifying
        written.rounds.append((num_drafts, max(num_verified)))
        moved = [(text, place + 1 + count) for (text, place), count in zip(places, accepted, strict=True)]
        places = [(text, place) for text, place in moved if place < length - 1]
    return written
