"""Cut each row's block at the first doubtful draft.

b rows, K drafts.
"""

from __future__ import annotations

from torch import Tensor

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling.confidence import ConfidenceSource, check_source_name, find_source
from dspark_hf.generation.scheduling.interface import Batch, CallInfo, RoundOutcome, Schedule, Scheduler

# Transformers' own default of `assistant_confidence_threshold`
DEFAULT_THRESHOLD = 0.4


class ThresholdScheduler(Scheduler):
    """Cut each row's block at the first draft whose confidence is below a threshold.

    Args:
        threshold: smallest confidence that is still verified, in [0, 1] (0.4, Transformers' default).
        confidence: `"head"` for the drafter's own confidence, `"online"` for the estimator that learns from the
            margin between the two best draft logits; default: the head if the drafter has one, else online.
    """

    name = "threshold"

    def __init__(self, threshold: float = DEFAULT_THRESHOLD, *, confidence: str | None = None):
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must lie in [0, 1], got {threshold}. It is compared with a probability.")
        self.threshold = threshold
        self.confidence = check_source_name(confidence)

    def start(self, call: CallInfo) -> Schedule:
        return _Threshold(self.threshold, find_source(self.confidence, call))


class _Threshold(Schedule):
    def __init__(self, threshold: float, source: ConfidenceSource):
        self._threshold = threshold
        self._source = source
        self.wants_margins = source.wants_margins

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        counts = count_confident(self._source.read(drafted), self._threshold)
        return [min(count, limit) for count, limit in zip(counts, batch.limits, strict=True)]

    def observe(self, outcome: RoundOutcome) -> None:
        self._source.learn(outcome)


def count_confident(confidence: Tensor, threshold: float) -> list[int]:
    """Return how many drafts of every row come before the first whose confidence `(b, K)` is below `threshold`."""
    counts: list[int] = (confidence >= threshold).long().cumprod(-1).sum(-1).tolist()
    return counts
