"""Calls, blocks and costs for schedules that are asked without a decoding loop.

b rows, K drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from dspark_hf.generation.drafting.interface import DraftedBlock, Drafter
from dspark_hf.generation.scheduling import AdaptiveScheduler, Batch, CallInfo, RoundOutcome, Schedule, Scheduler
from dspark_hf.generation.scheduling.costs.online import Costs
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.generation.drafters import ScriptedDrafter
from tests.tiny import tiny_target


class ListedCosts:
    """Costs from lists: `verify` by width, from 1 on, and `draft` by number of drafts, from 1 on; free if left out."""

    def __init__(self, verify: Sequence[float], draft: Sequence[float] | None = None):
        self.verify = list(verify)
        self.draft = list(draft or [0.0] * len(verify))

    def verify_seconds(self, num_rows: int, width: int, context_length: int) -> float:
        return self.verify[width - 1]

    def draft_seconds(self, num_rows: int, num_drafts: int, context_length: int) -> float:
        return self.draft[num_drafts - 1]


class SwingingCosts:
    """Costs under which drafting pays, and does not, by turns of `period` tokens."""

    def __init__(self, period: int):
        self.period = period

    def verify_seconds(self, num_rows: int, width: int, context_length: int) -> float:
        is_cheap = context_length // self.period % 2
        return 1 + (width - 1) * (0.01 if is_cheap else 5.0)

    def draft_seconds(self, num_rows: int, num_drafts: int, context_length: int) -> float:
        return 0.01


class ClockedAdaptive(Scheduler):
    """The adaptive scheduler, told that rounds take what `costs` say: what it does is the same in every run."""

    name = "clocked adaptive"

    def __init__(self, costs: Costs):
        self.costs = costs

    def start(self, call: CallInfo) -> Schedule:
        return _Clocked(AdaptiveScheduler(costs=self.costs).start(call), self.costs)


class _Clocked(Schedule):
    wants_margins = True

    def __init__(self, schedule: Schedule, costs: Costs):
        self._schedule = schedule
        self._costs = costs

    def num_drafts(self, batch: Batch) -> int:
        return self._schedule.num_drafts(batch)

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        return self._schedule.admit(drafted, batch)

    def observe(self, outcome: RoundOutcome) -> None:
        rows, length = outcome.batch.num_rows, outcome.batch.context_length
        drafting = self._costs.draft_seconds(rows, outcome.num_drafted, length) if outcome.num_drafted else 0.0
        verifying = self._costs.verify_seconds(rows, outcome.width, length)
        self._schedule.observe(replace(outcome, draft_seconds=drafting, other_seconds=verifying))


@cache
def _adapter() -> TargetAdapter:
    return TargetAdapter(tiny_target())


def new_drafter() -> Drafter:
    """Return a drafter that nothing is known of."""
    return ScriptedDrafter(_adapter().model, torch.zeros(1, 1, dtype=torch.long), [0], 1.0)


def new_call(
    *, drafter: Drafter | None = None, num_rows: int = 1, max_drafts: int = 5, is_sampling: bool = False
) -> CallInfo:
    """Return a call of a tiny target, with a drafter that nothing is known of by default."""
    return CallInfo(_adapter(), drafter or new_drafter(), num_rows, max_drafts, is_sampling=is_sampling)


def block_of(confidence: Tensor, margins: Tensor | None = None) -> DraftedBlock:
    """Return a block with those confidences `(b, K)` and margins."""
    return DraftedBlock(torch.zeros(confidence.shape, dtype=torch.long), None, confidence, margins)
