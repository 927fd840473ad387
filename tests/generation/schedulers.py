"""Schedulers with a script."""

from __future__ import annotations

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling import Batch, CallInfo, RoundOutcome, Schedule, Scheduler


class EveryThirdRound(Scheduler):
    """Draft in every third round only, so that in the others hidden states wait for the drafter."""

    name = "every third round"

    def start(self, call: CallInfo) -> Schedule:
        return _EveryThirdRound()


class _EveryThirdRound(Schedule):
    def __init__(self) -> None:
        self._num_rounds = 0

    def num_drafts(self, batch: Batch) -> int:
        return 0 if self._num_rounds % 3 else batch.max_drafts

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        return batch.cut(drafted.token_ids.shape[1])

    def observe(self, outcome: RoundOutcome) -> None:
        self._num_rounds += 1


class PlainSteps(Scheduler, Schedule):
    """Draft nothing: every pass is over one token."""

    name = "plain steps"

    def start(self, call: CallInfo) -> Schedule:
        return self

    def num_drafts(self, batch: Batch) -> int:
        return 0

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        raise AssertionError("nothing was to be drafted")
