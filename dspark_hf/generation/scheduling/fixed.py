"""Verify every draft."""

from __future__ import annotations

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling.interface import Batch, CallInfo, Schedule, Scheduler


class FixedScheduler(Scheduler):
    """Make and verify the same number of drafts in every round."""

    name = "fixed"

    def start(self, call: CallInfo) -> Schedule:
        return _Fixed()


class _Fixed(Schedule):
    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        return batch.cut(drafted.num_drafts)
