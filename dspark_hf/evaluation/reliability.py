"""How far a drafter's confidence can be trusted: what it believed of the drafts, against what came of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch

from dspark_hf.calibration.metrics import brier_score, expected_calibration_error, reliability_bins, roc_auc
from dspark_hf.evaluation.records import RoundRecord


@dataclass(frozen=True)
class Bin:
    """Drafts of similar belief: how many, what was believed on average, and how often it came true."""

    num_drafts: int
    believed: float
    observed: float


@dataclass(frozen=True)
class Trust:
    """How well beliefs foretell outcomes.

    Attributes:
        num_drafts: number of beliefs.
        ece: expected calibration error, mean gap between belief and outcome over bins.
        auc: chance that a draft that came true was believed in more than one that did not; None if all came out alike.
        brier: mean squared error.
        bins: the drafts by belief, empty bins left out.
    """

    num_drafts: int
    ece: float
    auc: float | None
    brier: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Reliability:
    """Trust in the confidence of verified drafts, before stop rules.

    Attributes:
        survival: of the belief that a draft and all before it are accepted: the product of their confidences.
        conditional: of the confidence itself, for the drafts whose prefix was accepted.
        believed_by_position: mean believed survival at each position.
        observed_by_position: share of the rounds that accepted every draft up to that position.
        num_by_position: number of rounds behind each of these.
    """

    survival: Trust
    conditional: Trust
    believed_by_position: tuple[float, ...]
    observed_by_position: tuple[float, ...]
    num_by_position: tuple[int, ...]


def measure_reliability(prompts: Sequence[Sequence[RoundRecord]]) -> Reliability | None:
    """Return how far the confidences can be trusted, given the rounds of every prompt; None without confidences."""
    rounds = [one for prompt in prompts for one in prompt if one.confidence and one.num_verified]
    if not rounds:
        return None
    survivals = [list(accumulate(one.confidence or (), mul)) for one in rounds]
    survival: list[tuple[float, bool]] = []
    conditional: list[tuple[float, bool]] = []
    by_position: list[list[tuple[float, bool]]] = [[] for _ in range(max(one.num_verified for one in rounds))]
    for one, survived in zip(rounds, survivals, strict=True):
        confidence = one.confidence or ()
        for position in range(one.num_verified):
            is_accepted = position < one.num_accepted
            survival.append((survived[position], is_accepted))
            by_position[position].append((survived[position], is_accepted))
            if position <= one.num_accepted:
                conditional.append((confidence[position], is_accepted))
    return Reliability(
        survival=_trust(survival),
        conditional=_trust(conditional),
        believed_by_position=tuple(_mean([belief for belief, _ in pairs]) for pairs in by_position),
        observed_by_position=tuple(_mean([outcome for _, outcome in pairs]) for pairs in by_position),
        num_by_position=tuple(len(pairs) for pairs in by_position),
    )


def _trust(pairs: Sequence[tuple[float, bool]]) -> Trust:
    beliefs = torch.tensor([belief for belief, _ in pairs], dtype=torch.float64)
    outcomes = torch.tensor([outcome for _, outcome in pairs])
    auc = roc_auc(beliefs, outcomes)
    bins = reliability_bins(beliefs, outcomes)
    columns = (bins.counts.tolist(), bins.mean_predictions.tolist(), bins.mean_outcomes.tolist())
    return Trust(
        num_drafts=len(pairs),
        ece=expected_calibration_error(beliefs, outcomes),
        auc=None if math.isnan(auc) else auc,
        brier=brier_score(beliefs, outcomes),
        bins=tuple(Bin(*row) for row in zip(*columns, strict=True) if row[0]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
