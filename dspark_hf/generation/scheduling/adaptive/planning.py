"""Whether to draft, how far, and which drafts to verify, from what earlier rounds were worth and cost.

N blocks, K drafts; level j is draft j of every row, its gain the number of them expected to be accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_hf.generation.scheduling.defaults import LEAST_GAIN, NUM_RATE_STEPS


@dataclass(frozen=True)
class Plan:
    """What to do until something new is known.

    Args:
        num_drafts: the best number of drafts, were one to draft.
        rate: tokens per second at which rounds are expected to run, at best.
        plain_rate: tokens per second without drafts.
        prices: how many tokens each level must be expected to yield to be worth its time at that rate, one for every
            draft; below zero where going on is cheaper than stopping.
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

    For a given rate of tokens per second it pays to go on from a level if, of those that can be gone on to, one is
    expected to yield more than its seconds times the rate; the best rate is the one that rounds cut in that way reach.
    So steps in the cost are looked past, and a width that costs more than a wider one is never stopped at.

    Args:
        gains: of every level in earlier rounds `(N, K)`, for all rows.
        num_live: rows that get a token of the target's own.
        draft_seconds: by number of drafts, from 1 on, `K` of them.
        verify_seconds: of a round, without drafting, by levels verified, from 0 on, `K + 1` of them; may fall.
    """
    seconds = np.asarray(verify_seconds)
    plain_rate = num_live / verify_seconds[0]
    totals = num_live + np.concatenate([np.zeros((len(gains), 1)), gains.cumsum(1)], axis=1)
    dearness = _least_seconds_per_gain(gains.mean(0), seconds)
    rate, num_drafts = plain_rate, 1
    for _ in range(NUM_RATE_STEPS):
        rates = []
        for count, drafting in enumerate(draft_seconds, start=1):
            levels = (gains[:, :count] >= rate * dearness[:count, count - 1]).cumprod(1).sum(1)
            rates.append(_mean_rate(totals, levels, drafting, seconds))
        num_drafts = 1 + int(np.argmax(rates))
        rate = rates[num_drafts - 1]
    best = max(rate, plain_rate)
    return Plan(num_drafts, rate, plain_rate, tuple((best * dearness[:num_drafts, num_drafts - 1]).tolist()))


def _least_seconds_per_gain(mean_gains: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `[j, k - 1]`: the seconds that a token of the level behind `j` costs, if one goes on to the best level
    of those up to `k`.

    Levels further on are taken to yield as much less than that one as they did on average.
    """
    num_drafts = len(mean_gains)
    mean_gains = np.maximum(mean_gains, LEAST_GAIN)
    reached = np.concatenate([[0.0], mean_gains.cumsum()])
    is_further = np.tri(num_drafts, num_drafts + 1, dtype=bool) == 0
    yields = np.where(is_further, reached - reached[:-1, None], 1.0)
    chords = np.where(is_further, (seconds - seconds[:-1, None]) / yields, np.inf)
    return np.minimum.accumulate(chords, axis=1)[:, 1:] * mean_gains[:, None]


def _mean_rate(
    totals: NDArray[np.float64], levels: NDArray[np.int64], drafting: float, seconds: NDArray[np.float64]
) -> float:
    tokens = totals[np.arange(len(totals)), levels].mean()
    return float(tokens / (drafting + seconds[levels].mean()))
