"""Survival, Algorithm 1 and the asynchronous order, against loops over the paper's equations."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dspark_hf.generation.scheduling import AsynchronousScheduler, Batch, HardwareAwareScheduler
from dspark_hf.generation.scheduling.asynchronous import Capacity, pass_depth
from dspark_hf.generation.scheduling.survival import best_level, possible_survival, prefix_survival, stop_level
from tests.generation.scheduling.fakes import ListedCosts, block_of, new_call
from tests.reference import scheduling as oracle

NUM_CASES = 300
# few values, so that survivals are equal or zero now and then; their products are exact in fp32
COARSE = (0.0, 0.25, 0.5, 1.0)


def _random_confidence(draw: random.Random, num_rows: int, num_drafts: int) -> Tensor:
    if draw.random() < 0.5:
        return torch.tensor([[draw.choice(COARSE) for _ in range(num_drafts)] for _ in range(num_rows)])
    # confident drafts, or most searches end at the first level
    return torch.tensor([[draw.random() ** 0.3 for _ in range(num_drafts)] for _ in range(num_rows)])


def _random_batch(draw: random.Random, num_rows: int, num_drafts: int) -> Batch:
    """Return a batch in which some rows have little room, and some wait."""
    limits = [num_drafts if draw.random() < 0.6 else draw.randint(0, num_drafts) for _ in range(num_rows)]
    limits[draw.randrange(num_rows)] = num_drafts
    waiting = [row for row in range(num_rows) if not limits[row]]
    return Batch(tuple(limits), num_rows - draw.randint(0, len(waiting)))


def _random_seconds(draw: random.Random, num_drafts: int) -> list[float]:
    """Return seconds by levels: a straight line, or stairs, some of them high."""
    slope, stair = draw.uniform(0.01, 0.5), draw.choice([0.0, 0.3, 1.0])
    width = draw.randint(1, 4)
    return [1 + slope * level + stair * (level // width) for level in range(num_drafts + 1)]


def _cases():
    draw = random.Random(0)
    for _ in range(NUM_CASES):
        num_rows, num_drafts = draw.randint(1, 5), draw.randint(1, 7)
        confidence = _random_confidence(draw, num_rows, num_drafts)
        batch = _random_batch(draw, num_rows, num_drafts)
        yield draw, confidence, batch, _random_seconds(draw, num_drafts)


def _survivals(confidence: Tensor, batch: Batch) -> list[list[float]]:
    return [oracle.survival(row, limit) for row, limit in zip(confidence.tolist(), batch.limits, strict=True)]


def test_survival_is_the_product_of_confidences():
    """Drafts are ranked by their own chance instead of the chance that they are reached."""
    for _, confidence, batch, _ in _cases():
        everywhere = [oracle.survival(row, len(row)) for row in confidence.tolist()]
        torch.testing.assert_close(prefix_survival(confidence), torch.tensor(everywhere))
        torch.testing.assert_close(possible_survival(confidence, batch), torch.tensor(_survivals(confidence, batch)))


def test_stop_level_is_algorithm_1():
    """More or fewer levels are verified than Algorithm 1 admits."""
    levels = []
    for _, confidence, batch, seconds in _cases():
        survivals = _survivals(confidence, batch)
        gains = [sum(column) for column in zip(*survivals, strict=True)]
        levels.append(stop_level(gains, batch.num_live, seconds.__getitem__))
        assert levels[-1] == oracle.admitted_levels(survivals, batch.num_live, seconds)
    # the cases stop at once, midway and not at all
    assert {0, 1, 2, 3, 7} <= set(levels)


def test_best_level_is_the_best_of_all():
    """The width taken from earlier rounds is not the best for them."""
    is_other = False
    for _, confidence, batch, seconds in _cases():
        survivals = _survivals(confidence, batch)
        gains = [sum(column) for column in zip(*survivals, strict=True)]
        level = best_level(gains, batch.num_live, seconds.__getitem__)
        assert level == oracle.best_levels(survivals, batch.num_live, seconds)
        is_other |= level != oracle.admitted_levels(survivals, batch.num_live, seconds)
    # some stairs are worth climbing although their first step is not
    assert is_other


def test_a_level_that_raises_nothing_is_left_out():
    """Drafts are verified that bring as much as they cost."""
    # every level is a token for a second, as a round without drafts is
    assert stop_level([1.0, 1.0], 1, [1.0, 2.0, 3.0].__getitem__) == 0
    assert best_level([1.0, 1.0], 1, [1.0, 2.0, 3.0].__getitem__) == 0
    assert stop_level([1.0, 1.0], 1, [1.0, 1.5, 2.25].__getitem__) == 1


def test_hardware_aware_schedule_admits_what_algorithm_1_does():
    """The schedule counts rows that wait, drafts that a row has no room for, or another pass's seconds."""
    for draw, confidence, batch, seconds in _cases():
        num_drafts = confidence.shape[1]
        drafting = draw.choice([0.0, 0.4])
        costs = ListedCosts(seconds, [drafting] * num_drafts)
        call = new_call(num_rows=batch.num_rows, max_drafts=num_drafts)
        schedule = HardwareAwareScheduler(costs=costs, confidence="head").start(call)
        assert schedule.num_drafts(batch) == num_drafts
        with_drafting = [drafting + one for one in seconds]
        level = oracle.admitted_levels(_survivals(confidence, batch), batch.num_live, with_drafting)
        assert schedule.admit(block_of(confidence), batch) == [min(level, limit) for limit in batch.limits]


def test_pass_depth_is_that_of_a_search_that_does_not_look_ahead():
    """The asynchronous scheduler does not take the next best draft, so that a draft may decide about itself."""
    for draw, confidence, batch, _ in _cases():
        survival = possible_survival(confidence, batch)
        num_rows, num_drafts = survival.shape
        count, depth = draw.randint(0, num_rows * num_drafts), draw.randint(0, num_drafts)
        taken = oracle.admitted_drafts(survival.tolist(), count, depth)
        assert pass_depth(survival, Capacity(count / num_rows, depth)) == max(taken)


def test_capacity_follows_the_number_of_rows():
    """Rows that leave the batch leave their share of the capacity to the others, or take more than their share."""
    survival = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.6, 0.5]])
    assert pass_depth(survival, Capacity(1.5, 3)) == 2
    assert pass_depth(survival[:1], Capacity(1.5, 3)) == 2
    assert pass_depth(survival[1:], Capacity(1.0, 3)) == 1
    assert pass_depth(survival, Capacity(9.0, 3)) == 3


def test_asynchronous_schedule_reaches_the_best_width_of_steady_rounds():
    """The capacity of earlier rounds does not lead to the width that was best for them."""
    for _, confidence, batch, seconds in _cases():
        call = new_call(num_rows=batch.num_rows, max_drafts=confidence.shape[1])
        schedule = AsynchronousScheduler(costs=ListedCosts(seconds), confidence="head").start(call)
        admitted = [schedule.admit(block_of(confidence), batch) for _ in range(4)]
        everything = list(batch.limits)
        level = oracle.best_levels(_survivals(confidence, batch), batch.num_live, seconds)
        best = [min(level, limit) for limit in batch.limits]
        assert admitted == [everything, everything, best, best]


@pytest.mark.parametrize("num_rounds", [2, 3, 5])
def test_asynchronous_capacity_is_two_rounds_old(num_rounds):
    """A round's own confidences decide how much of it is verified."""
    costs = ListedCosts([1.0, 1.2, 1.4, 1.6])
    schedule = AsynchronousScheduler(costs=costs, confidence="head").start(new_call(max_drafts=3))
    batch = Batch((3,), 1)
    sure, hopeless = torch.full((1, 3), 0.9), torch.full((1, 3), 0.01)
    for _ in range(num_rounds):
        schedule.admit(block_of(sure), batch)
    # two more rounds of the old width, whatever their own confidences
    assert [schedule.admit(block_of(hopeless), batch) for _ in range(4)] == [[3], [3], [0], [0]]
