"""What a confidence threshold would have done, worked out from the rounds of one run that verified every draft.

Exact for every round: the confidence of a draft depends on the drafts before it only, so a cut leaves those, and what
the target makes of them, as they were; the round then accepts the smaller of the two lengths. Estimated for a whole
run: with shorter rounds a run meets other anchors, and here the anchors are those of the full run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dspark_hf.evaluation.intervals import Estimate, ratio_of_sums
from dspark_hf.evaluation.records import RoundRecord
from dspark_hf.generation.scheduling.threshold import count_confident

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class SweepPoint:
    """One threshold of the confidence.

    Attributes:
        threshold: smallest confidence that is still verified.
        tau: committed tokens per round, the bonus token included.
        verified_share: share of the drafted tokens that are verified.
        verify_rate: share of the verified drafts that are accepted; None if none is verified.
    """

    threshold: float
    tau: Estimate
    verified_share: Estimate
    verify_rate: Estimate | None


def sweep_thresholds(
    prompts: Sequence[Sequence[RoundRecord]], thresholds: Sequence[float] = THRESHOLDS
) -> tuple[SweepPoint, ...] | None:
    """Return a point for every threshold, or None where no draft has a confidence.

    Raises:
        ValueError: if a draft was not verified: what the target makes of it is unknown.
    """
    if not any(one.confidence for rounds in prompts for one in rounds):
        return None
    points = []
    for threshold in thresholds:
        cut = [cut_rounds(rounds, threshold) for rounds in prompts]
        verified = [sum(one.num_verified for one in rounds) for rounds in cut]
        tau = ratio_of_sums([sum(one.num_committed for one in rounds) for rounds in cut], [len(one) for one in cut])
        share = ratio_of_sums(verified, [sum(one.num_drafted for one in rounds) for rounds in cut])
        rate = ratio_of_sums([sum(one.num_accepted for one in rounds) for rounds in cut], verified)
        assert tau is not None and share is not None
        points.append(SweepPoint(threshold, tau, share, rate))
    return tuple(points)


def cut_rounds(rounds: Sequence[RoundRecord], threshold: float) -> list[RoundRecord]:
    """Return what the same rounds would have been, had the first draft below `threshold` ended each block.

    Raises:
        ValueError: if a draft was not verified.
    """
    for one in rounds:
        if one.num_verified != one.num_drafted:
            raise ValueError(
                f"`rounds` must have verified every draft, got {one.num_verified} of {one.num_drafted}. Run them with "
                "`assistant_confidence_threshold=0`."
            )
    return [
        replace(
            one,
            num_verified=limit,
            num_accepted=min(one.num_accepted, limit),
            num_committed=min(one.num_committed, limit + 1),
        )
        for one, limit in zip(rounds, _admitted(rounds, threshold), strict=True)
    ]


def _admitted(rounds: Sequence[RoundRecord], threshold: float) -> list[int]:
    """Return how many drafts of each round the threshold admits."""
    width = max((one.num_drafted for one in rounds), default=0)
    # as a run does: no threshold is no cut
    if not threshold or not width:
        return [one.num_drafted for one in rounds]
    # short blocks are filled up with what no threshold admits
    confidence = [(*(one.confidence or ()), *[-1.0] * (width - len(one.confidence or ()))) for one in rounds]
    # the scheduler itself, so that a confidence at the threshold is rounded as in a run
    return count_confident(torch.tensor(confidence), threshold)
