"""What schedulers share that weigh confidence against costs."""

from __future__ import annotations

from abc import abstractmethod

from dspark_hf.generation.scheduling.confidence import ConfidenceSource, check_source_name, find_source
from dspark_hf.generation.scheduling.costs.online import Costs
from dspark_hf.generation.scheduling.costs.profile import find_profile
from dspark_hf.generation.scheduling.interface import Call, Outcome, Schedule, Scheduler


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

    def start(self, call: Call) -> Schedule:
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

    def observe(self, outcome: Outcome) -> None:
        self._source.learn(outcome)
