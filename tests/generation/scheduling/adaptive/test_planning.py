"""Plans against searches over everything that could be planned.

N blocks, K drafts.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from dspark_hf.generation.scheduling.adaptive.planning import Plan, make_plan


def _rate(
    gains: np.ndarray, num_live: int, drafting: list[float], verify: list[float], count: int, levels: list[int]
) -> float:
    """Return tokens per second if block i, of `count` drafts, is verified down to `levels[i]`."""
    tokens = seconds = 0.0
    for block, level in zip(gains, levels, strict=True):
        level = min(level, count)
        tokens += num_live + block[:level].sum()
        seconds += drafting[count - 1] + verify[level]
    return tokens / seconds


def _best_rate(gains: np.ndarray, num_live: int, drafting: list[float], verify: list[float]) -> float:
    """Return the highest rate of any number of drafts and any levels of the blocks."""
    num_drafts = gains.shape[1]
    choices = itertools.product(range(num_drafts + 1), repeat=len(gains))
    return max(
        _rate(gains, num_live, drafting, verify, count, list(levels))
        for levels in choices
        for count in range(1, num_drafts + 1)
    )


def _random_gains(draw: random.Random, num_blocks: int, num_drafts: int) -> np.ndarray:
    return np.array([[draw.random() ** 0.5 for _ in range(num_drafts)] for _ in range(num_blocks)]).cumprod(1)


@pytest.mark.parametrize("stair", [0.0, 0.6, "random"])
@pytest.mark.parametrize("num_live", [1, 4])
def test_plan_is_nearly_the_best_there_is(num_live, stair):
    """A plan leaves much of what could be gained, or promises more than it can reach."""
    draw = random.Random(0)
    for _ in range(60):
        num_blocks, num_drafts = draw.randint(1, 3), draw.randint(1, 4)
        gains = num_live * _random_gains(draw, num_blocks, num_drafts)
        drafting = [draw.uniform(0, 0.4) + 0.05 * count for count in range(1, num_drafts + 1)]
        slope = draw.uniform(0.01, 0.8)
        stairs = [
            draw.uniform(0, 0.6) if stair == "random" else stair * (level > 1) for level in range(num_drafts + 1)
        ]
        verify = [1 + slope * level + height for level, height in enumerate(stairs)]
        plan = make_plan(gains, num_live, drafting, verify)
        best = _best_rate(gains, num_live, drafting, verify)
        assert plan.rate <= best * (1 + 1e-9)
        # levels are cut by price, and on stairs by what they lead to on average
        assert plan.rate >= (0.97 if stair == 0 else 0.9) * best
        assert plan.plain_rate == pytest.approx(num_live / verify[0])
        assert 1 <= plan.num_drafts <= num_drafts


def test_plan_knows_when_drafting_does_not_pay():
    """A drafter that costs more than it brings is expected to pay."""
    gains = np.full((8, 3), 0.1)
    plan = make_plan(gains, 1, [0.5, 0.6, 0.7], [1.0, 1.2, 1.4, 1.6])
    assert plan.rate < plan.plain_rate


def test_plan_drafts_no_more_than_it_verifies():
    """Drafts are made that no block is worth verifying."""
    # the third draft never comes
    gains = np.array([[0.9, 0.8, 0.0], [0.95, 0.7, 0.01]])
    plan = make_plan(gains, 1, [0.1, 0.2, 0.3], [1.0, 1.1, 1.2, 1.3])
    assert plan.num_drafts == 2


def test_plan_looks_past_a_stair():
    """The first step of a stair keeps a plan from the flight behind it."""
    gains = np.full((4, 4), 0.9)
    plan = make_plan(gains, 1, [0.01] * 4, [1.0, 2.0, 2.0, 2.0, 2.0])
    assert plan.num_drafts == 4
    assert plan.admit([0.9, 0.9, 0.9, 0.9]) == 4
    # 4.6 tokens in 2.01 seconds
    assert plan.rate == pytest.approx(4.6 / 2.01)


def test_levels_are_admitted_up_to_the_first_that_is_too_dear():
    """A level behind a cut is verified, or a level at its price is not."""
    plan = Plan(4, 1.0, 1.0, (0.5, 0.4, 0.3, 0.2))
    assert plan.admit([0.5, 0.4, 0.3, 0.2]) == 4
    assert plan.admit([0.9, 0.3, 0.9, 0.9]) == 1
    assert plan.admit([0.4, 0.9, 0.9, 0.9]) == 0
    assert plan.admit([0.9, 0.9]) == 2


def test_a_width_that_is_dearer_than_a_wider_one_is_passed_over():
    """A pass stops at a width at which a pass over more drafts would have been quicker."""
    gains = np.array([[0.9, 0.5, 0.2], [0.8, 0.6, 0.3], [0.95, 0.4, 0.1]])
    plan = make_plan(gains, 1, [0.01, 0.02, 0.03], [1.0, 1.5, 1.6, 1.1])
    assert plan.num_drafts == 3
    assert plan.prices[1] < 0 and plan.prices[2] < 0
    # the first draft decides about all three, and one that is nearly hopeless about none
    assert plan.admit([0.5, 0.0, 0.0]) == 3
    assert plan.admit([0.01, 0.0, 0.0]) == 0


def test_hopeless_levels_are_bought_only_if_they_save_time():
    """A level that never yielded anything is verified, or breaks a plan."""
    gains = np.array([[0.9, 0.0, 0.0]])
    rising = make_plan(gains, 1, [0.1] * 3, [1.0, 1.1, 1.2, 1.3])
    assert rising.admit([0.9, 0.0, 0.0]) == 1
    falling = make_plan(gains, 1, [0.1] * 3, [1.0, 1.3, 1.2, 1.1])
    assert falling.num_drafts == 3
    assert falling.admit([0.9, 0.0, 0.0]) == 3


def test_prices_are_the_least_seconds_per_token():
    """A price is not that of the way to the width that is best to go on to."""
    draw = random.Random(1)
    for _ in range(100):
        num_drafts = draw.randint(1, 6)
        gains = _random_gains(draw, 5, num_drafts)
        verify = [1 + draw.random() for _ in range(num_drafts + 1)]
        plan = make_plan(gains, 1, [0.1] * num_drafts, verify)
        rate, means = max(plan.rate, plan.plain_rate), gains.mean(0)
        for level, price in enumerate(plan.prices):
            ways = range(level + 1, plan.num_drafts + 1)
            expected = min((verify[to] - verify[level]) / means[level:to].sum() for to in ways) * means[level]
            assert price == pytest.approx(rate * expected)
