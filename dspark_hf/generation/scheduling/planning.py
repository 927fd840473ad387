"""Whether to draft, how far, and which drafts to verify, from what earlier rounds were worth and cost.

N blocks, K drafts; level j is draft j of every row, its gain the number of them expected to be accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# the best rate is the fixed point of a map that converges in a few steps
_NUM_STEPS = 3


@dataclass(frozen=True)
class Plan:
    """What to do until something new is known.

    Args:
        num_drafts: the best number of drafts, were one to draft.
        rate: tokens per second at which rounds are expected to run, at best.
        plain_rate: tokens per second without drafts.
        prices: how many tokens each level must be expected to yield to be worth its time at that rate, `K` of them.
    """

    num_drafts: int
    rate: float
    plain_rate: float
    prices: tuple[float, ...]

    def admit(self, gains: Sequence[float]) -> int:
        """Return how many levels to verify: those before the first whose gain is below its price.

        Prices are of earlier rounds, and the gain of a level depends on the drafts before it only.
        """
        for level, (gain, price) in enumerate(zip(gains, self.prices, strict=False)):
            if gain < price:
                return level
        return min(len(gains), len(self.prices))


def make_plan(
    gains: NDArray[np.float64], num_live: int, draft_seconds: Sequence[float], verify_seconds: Sequence[float]
) -> Plan:
    """Return the plan that gives the most tokens per second on rounds like the earlier ones.

    For a given rate of tokens per second a level pays if it yields more than its seconds times the rate; the best
    rate is the one that rounds cut in that way reach. Steps in the cost are looked past: a level's price is its share
    of the way to the next width that is worth going to.

    Args:
        gains: of every level in earlier rounds `(N, K)`, for all rows.
        num_live: rows that get a token of the target's own.
        draft_seconds: by number of drafts, from 1 on, `K` of them.
        verify_seconds: of a round, without drafting, by levels verified, from 0 on, `K + 1` of them.
    """
    plain_rate = num_live / verify_seconds[0]
    marginal = np.maximum(np.diff(convex_minorant(verify_seconds)), 0.0)
    seconds = np.asarray(verify_seconds)
    totals = num_live + np.concatenate([np.zeros((len(gains), 1)), gains.cumsum(1)], axis=1)
    rate, num_drafts = plain_rate, 1
    for _ in range(_NUM_STEPS):
        levels = (gains >= rate * marginal).cumprod(1).sum(1)
        rates = [
            _mean_rate(totals, np.minimum(levels, count), drafting, seconds)
            for count, drafting in enumerate(draft_seconds, start=1)
        ]
        num_drafts = 1 + int(np.argmax(rates))
        rate = rates[num_drafts - 1]
    best = max(rate, plain_rate)
    return Plan(num_drafts, rate, plain_rate, tuple((best * marginal).tolist()))


def _mean_rate(
    totals: NDArray[np.float64], levels: NDArray[np.int64], drafting: float, seconds: NDArray[np.float64]
) -> float:
    tokens = totals[np.arange(len(totals)), levels].mean()
    return float(tokens / (drafting + seconds[levels].mean()))


def convex_minorant(values: Sequence[float]) -> list[float]:
    """Return the greatest convex sequence that is nowhere above `values`."""
    corners: list[int] = []
    for place in range(len(values)):
        while len(corners) > 1 and _is_above(values, corners[-2], corners[-1], place):
            corners.pop()
        corners.append(place)
    return np.interp(range(len(values)), corners, [values[corner] for corner in corners]).tolist()


def _is_above(values: Sequence[float], left: int, middle: int, right: int) -> bool:
    """Return whether the middle point lies on or above the line between the others."""
    slope = (values[right] - values[left]) / (right - left)
    return values[middle] >= values[left] + slope * (middle - left)
