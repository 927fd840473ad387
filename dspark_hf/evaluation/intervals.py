"""Ratios over prompts, with bootstrap intervals.

P prompts, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NUM_RESAMPLES = 2000
COVERAGE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% bootstrap interval over prompts; the interval is None where there is one prompt only."""

    value: float
    low: float | None = None
    high: float | None = None


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Estimate | None:
    """Return the sum of the numerators over the sum of the denominators, one of each per prompt.

    Whole prompts are resampled, since the rounds within one are alike. Returns None where the denominators are zero.

    Example:

        >>> ratio_of_sums([2.0, 4.0], [1.0, 1.0]).value
        3.0
    """
    total = sum(denominators)
    if not total:
        return None
    value = sum(numerators) / total
    if len(numerators) < 2:
        return Estimate(value)
    pairs = torch.tensor([numerators, denominators], dtype=torch.float64)  # [2, P]
    drawn = torch.randint(
        len(numerators), (NUM_RESAMPLES, len(numerators)), generator=torch.Generator().manual_seed(seed)
    )
    sums = pairs[:, drawn].sum(-1)  # [2, S]
    # a resample may hold only prompts without a denominator
    ratios = (sums[0] / sums[1])[sums[1] > 0]
    tail = (1 - COVERAGE) / 2
    low, high = torch.quantile(ratios, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)
