"""The paper's Algorithm 1 over the levels of a padded batch."""

from __future__ import annotations

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling.confidence import ConfidenceSource
from dspark_hf.generation.scheduling.costs.online import Costs, round_seconds
from dspark_hf.generation.scheduling.interface import Batch, Schedule
from dspark_hf.generation.scheduling.profiled import ProfiledSchedule, ProfiledScheduler
from dspark_hf.generation.scheduling.survival import possible_survival, stop_level


class HardwareAwareScheduler(ProfiledScheduler):
    """Verify as many levels as raise the expected throughput, and stop at the first that does not.

    All rows of a padded batch cost as much as the longest, so drafts are admitted level by level: draft j of every
    row at once.

    Args:
        costs: what passes cost; default: this machine's profile of the target, made on first use.
        confidence: `"head"` for the drafter's own confidence, `"online"` for the estimator that learns from the
            margin between the two best draft logits; default: the head if the drafter has one, else online.
    """

    name = "hardware_aware"

    def _schedule(self, costs: Costs, source: ConfidenceSource) -> Schedule:
        return _HardwareAware(costs, source)


class _HardwareAware(ProfiledSchedule):
    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        # the round's one transfer from the device
        gains: list[float] = possible_survival(self._source.read(drafted), batch).sum(0).tolist()
        return batch.cut(stop_level(gains, batch.num_live, round_seconds(self._costs, batch, len(gains))))
