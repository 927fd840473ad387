"""The paper's Algorithm 1 over the levels of a padded batch, and what the asynchronous variant shares with it."""

from __future__ import annotations

from abc import abstractmethod

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling.confidence import ConfidenceSource, check_source_name, find_source
from dspark_hf.generation.scheduling.costs.online import Costs, round_seconds
from dspark_hf.generation.scheduling.costs.profile import find_profile
from dspark_hf.generation.scheduling.interface import Batch, CallInfo, RoundOutcome, Schedule, Scheduler
from dspark_hf.generation.scheduling.survival import possible_survival, stop_level


class ProfiledScheduler(Scheduler):
    """A scheduler that knows what passes cost and how sure the drafts are.

    Args:
        costs: what passes cost; default: this machine's profile of the target, made on first use.
        confidence: `"head"` for the drafter's own confidence, `"online"` for the estimator that learns from the
            margin between the two best draft logits; default: the head if the drafter has one, else online.
    """

    def __init__(self, *, costs: Costs | None = None, confidence: str | None = None):
        self.costs = costs
        self.confidence = check_source_name(confidence)

    def start(self, call: CallInfo) -> Schedule:
        return self._schedule(self.costs or find_profile(call), find_source(self.confidence, call))

    @abstractmethod
    def _schedule(self, costs: Costs, source: ConfidenceSource) -> Schedule:
        """Return the schedule of one call."""


class ProfiledSchedule(Schedule):
    """Decisions from costs and confidence, whose source learns from every round."""

    def __init__(self, costs: Costs, source: ConfidenceSource):
        self._costs = costs
        self._source = source
        self.wants_margins = source.wants_margins

    def observe(self, outcome: RoundOutcome) -> None:
        self._source.learn(outcome)


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
        seconds = round_seconds(self._costs, batch, drafted.num_modelled_drafts)
        return batch.cut(stop_level(gains, batch.num_live, seconds))
