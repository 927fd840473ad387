"""Decide whether to draft, how far, and which drafts to verify, from the gains and costs of earlier rounds.

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
    """The decisions for the next few rounds.

    Args:
        num_drafts: the best number of drafts, if the round drafts at all.
        rate: expected tokens per second with that number of drafts.
        plain_rate: tokens per second without drafts.
        prices: the gain from which each level is worth its time at that rate, one price per draft. A price is below
            zero where a wider pass is cheaper than a narrower one.
    """

    num_drafts: int
    rate: float
    plain_rate: float
    prices: tuple[float, ...]

    def admit(self, gains: Sequence[float]) -> int:
        """Return how many levels to verify: all before the first whose gain is below its price.

        No draft decides about itself: prices come from earlier rounds, and the gain of a level depends only on the
        drafts before it.
        """
        for level, (gain, price) in enumerate(zip(gains, self.prices, strict=False)):
            if gain < price:
                return level
        return min(len(gains), len(self.prices))


def make_plan(
    gains: NDArray[np.float64], num_live: int, draft_seconds: Sequence[float], verify_seconds: Sequence[float]
) -> Plan:
    """Return the plan that would have given the most tokens per second in the earlier rounds.

    Suppose that a rate of tokens per second can be reached. Then going on from a level pays if some later level adds
    more tokens than its extra seconds times that rate. Cutting every round by this rule yields a new rate, and
    repeating that converges to the best one. Since every later level is looked at, a single expensive step does not
    stop a round, and a round never stops at a width that costs more than a wider one.

    Args:
        gains: gains of all levels in earlier rounds `(N, K)`, summed over the rows.
        num_live: rows that get a token of the target's own.
        draft_seconds: `K` times, for 1 draft, 2 drafts and so on.
        verify_seconds: `K + 1` times of a round without its drafting, for 0 verified levels, 1 level and so on; they
            may fall.
    """
    seconds = np.asarray(verify_seconds)
    plain_rate = num_live / verify_seconds[0]
    totals = num_live + np.concatenate([np.zeros((len(gains), 1)), gains.cumsum(1)], axis=1)
    dearness = _least_seconds_per_gain(gains.mean(0), seconds)
    rate, num_drafts = plain_rate, 1
    # the best rate is a fixed point, found by iteration
    for _ in range(NUM_RATE_STEPS):
        # of all numbers of drafts k at once; levels behind the k-th are of infinite price  [K, N]
        levels = (gains >= rate * dearness.T[:, None]).cumprod(2).sum(2)
        tokens = totals[np.arange(len(gains)), levels].mean(1)
        rates = tokens / (np.asarray(draft_seconds) + seconds[levels].mean(1))
        num_drafts = 1 + int(np.argmax(rates))
        rate = float(rates[num_drafts - 1])
    best = max(rate, plain_rate)
    return Plan(num_drafts, rate, plain_rate, tuple((best * dearness[:num_drafts, num_drafts - 1]).tolist()))


def _least_seconds_per_gain(mean_gains: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `[j, k - 1]`: the seconds per token of level `j + 1`, when a round with `k` drafts goes on to the level
    that makes them fewest.

    Gains of levels behind `j + 1` are not known yet. They are taken to be in the same proportion to its gain as their
    means are.
    """
    num_drafts = len(mean_gains)
    mean_gains = np.maximum(mean_gains, LEAST_GAIN)
    reached = np.concatenate([[0.0], mean_gains.cumsum()])
    is_further = np.tri(num_drafts, num_drafts + 1, dtype=bool) == 0
    yields = np.where(is_further, reached - reached[:-1, None], 1.0)
    # seconds from level j to each later level, per token gained on the way; then the least up to level k
    chords = np.where(is_further, (seconds - seconds[:-1, None]) / yields, np.inf)
    return np.minimum.accumulate(chords, axis=1)[:, 1:] * mean_gains[:, None]
