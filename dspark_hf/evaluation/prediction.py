"""What other settings would come to, predicted from the rounds that verified every draft and from their time.

A round takes the time of a plain step and what drafting and a wider pass add to it. The time that they add together is
known for whole blocks. For fewer drafts it is taken to be proportional to their number. A threshold still makes all
drafts, and saves at most the share of drafts that it leaves unverified: less, the more of the time is the drafter's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from dspark_hf.evaluation.results import DrafterResult


@dataclass(frozen=True)
class PredictedSpeed:
    """A setting and its predicted speed, plain `generate` being 1."""

    setting: float
    speed: float


def best(points: tuple[PredictedSpeed, ...]) -> PredictedSpeed:
    """Return the fastest of the points, the first of equals."""
    return max(points, key=lambda point: point.speed)


def speed_by_threshold(result: DrafterResult) -> tuple[PredictedSpeed, ...]:
    """Return the speed at every threshold of the sweep at best, as if drafting itself took no time."""
    times = _times(result)
    if times is None or not result.sweep:
        return ()
    plain, whole = times
    return tuple(
        PredictedSpeed(
            point.threshold, point.tau.value * plain / (plain + (whole - plain) * point.verified_share.value)
        )
        for point in result.sweep
    )


def speed_by_drafts(result: DrafterResult, block_size: int) -> tuple[PredictedSpeed, ...]:
    """Return the speed for every number of drafts a round, from 1 to the `block_size` that was measured."""
    times, rates = _times(result), result.acceptance.rate_by_position
    if times is None:
        return ()
    plain, whole = times
    # no round came as far as the positions without a rate
    chances = [rate.value for rate in rates] + [0.0] * (block_size - len(rates))
    # tokens per round: the target's own, and each draft that is reached and accepted
    taus = accumulate(accumulate(chances, mul), initial=1.0)
    next(taus)
    return tuple(
        PredictedSpeed(count, tau * plain / (plain + (whole - plain) * count / block_size))
        for count, tau in enumerate(taus, start=1)
    )


def _times(result: DrafterResult) -> tuple[float, float] | None:
    """Return the seconds of a plain step and of a round over a whole block, prefills shared out among the tokens."""
    prompts, tau = result.prompts, result.acceptance.tau
    num_plain = sum(sum(one.num_plain_tokens) for one in prompts)
    num_assisted = sum(sum(one.num_tokens) for one in prompts)
    if tau is None or not num_plain or not num_assisted:
        return None
    plain = sum(sum(one.plain_seconds) for one in prompts) / num_plain
    assisted = sum(sum(one.seconds) for one in prompts) / num_assisted
    # a round cannot be quicker than the step it holds: a clock that says so is noise
    return plain, max(assisted * tau.value, plain)
