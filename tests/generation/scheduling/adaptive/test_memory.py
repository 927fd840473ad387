"""What a process remembers of a drafter, and how its recent blocks stand for those to come."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.scheduling import AdaptiveScheduler, CallInfo, ThresholdScheduler
from dspark_hf.generation.scheduling.adaptive.memory import RecentMargins, remembered
from dspark_hf.generation.scheduling.estimator import AcceptanceEstimator
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.generation.prompts import ragged_prompts
from tests.generation.scheduling.fakes import ListedCosts, new_call, new_drafter
from tests.tiny import tiny_target


def test_memory_outlives_a_call():
    """Every call starts from nothing, however much the process has seen of the drafter."""
    drafter = new_drafter()
    first = remembered(new_call(drafter=drafter))
    assert remembered(new_call(drafter=drafter, num_rows=4)) is first


def test_memory_is_of_a_drafter_and_its_use():
    """One drafter is judged by another, greedy drafts by sampled ones, or one target's by those of its like."""
    drafter, other = new_drafter(), new_drafter()
    calls = [new_call(drafter=drafter), new_call(drafter=other), new_call(drafter=drafter, is_sampling=True)]
    calls += [CallInfo(TargetAdapter(tiny_target(seed=seed)), drafter, 1, 5) for seed in (1, 2)]
    memories = [remembered(call) for call in calls]
    assert len({id(memory) for memory in memories}) == 5
    assert len({id(memory.estimator) for memory in memories}) == 5
    # the targets taking turns
    assert all(remembered(call) is memory for call, memory in zip(calls, memories, strict=True))


def test_parking_is_of_batches_of_a_size():
    """What loses with many rows is given up for single rows too, or each number of rows starts from nothing."""
    memory = remembered(new_call())
    assert memory.parking(1) is not memory.parking(16)
    assert memory.parking(16) is memory.parking(17)


def test_memory_is_freed_with_its_drafter():
    """A process that loads one drafter after the other keeps all of them."""
    drafter = new_drafter()
    memory = weakref.ref(remembered(new_call(drafter=drafter)))
    alive = weakref.ref(drafter)
    assert memory() is not None
    del drafter
    gc.collect()
    assert alive() is None
    assert memory() is None


def test_memory_is_freed_with_its_target():
    """A process that loads one target after the other for a drafter keeps all of them."""
    drafter, target = new_drafter(), tiny_target()
    memory = weakref.ref(remembered(CallInfo(TargetAdapter(target), drafter, 1, 5)))
    alive = weakref.ref(target)
    assert memory() is not None
    del target
    gc.collect()
    assert alive() is None
    assert memory() is None


@pytest.mark.parametrize(
    "scheduler", [AdaptiveScheduler(costs=ListedCosts([1.0] * 16)), ThresholdScheduler(0.1, confidence="online")]
)
def test_generating_teaches_the_memory(scheduler):
    """What a call saw of a drafter is not kept."""
    target = tiny_target()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    call = CallInfo(TargetAdapter(target), drafter, 1, 7)
    before = remembered(call).estimator.bias
    options = {"max_new_tokens": 12, "do_sample": False, "scheduler": scheduler, "draft_tree": "off"}
    target.generate(**ragged_prompts(1), assistant_model=drafter, **options)
    greedy, sampling = remembered(call), remembered(CallInfo(call.target, drafter, 1, 7, is_sampling=True))
    assert greedy.estimator.bias != before
    assert sampling.estimator.bias == before


def _taught(bias: float, slope: float) -> AcceptanceEstimator:
    estimator = AcceptanceEstimator()
    estimator.bias, estimator.slope = bias, slope
    return estimator


# margins are log-odds to this one
_ESTIMATOR = _taught(0.0, 1.0)


def _margins(*chances: float) -> list[float]:
    return [math.log(chance / (1 - chance)) for chance in chances]


@pytest.mark.parametrize("num_rows", [1, 16])
def test_experience_holds_the_latest_blocks(num_rows):
    """A plan is made for text long past, or of a block or two."""
    recent_margins = RecentMargins()
    for number in range(300):
        recent_margins.add([_margins(1 / (2 + number))] * num_rows)
    gains = recent_margins.gains(1, _ESTIMATOR)
    assert 4 <= len(gains) < 100
    assert np.allclose(gains[:, 0], [1 / (2 + number) for number in range(300 - len(gains), 300)])
    assert recent_margins.num_blocks == 300


def test_gains_are_the_rows_mean_survival():
    """A block is worth another row's drafts, or each draft's chance instead of its prefix's."""
    recent_margins = RecentMargins()
    recent_margins.add([_margins(0.8, 0.5, 0.5), _margins(0.4, 0.1, 0.9)])
    expected = [(0.8 + 0.4) / 2, (0.8 * 0.5 + 0.4 * 0.1) / 2, (0.8 * 0.5 * 0.5 + 0.4 * 0.1 * 0.9) / 2]
    assert np.allclose(recent_margins.gains(3, _ESTIMATOR), [expected])
    assert np.allclose(recent_margins.gains(2, _ESTIMATOR), [expected[:2]])


def test_the_past_is_judged_by_what_is_known_now():
    """Blocks keep the worth they were first thought to have, however wrong that proved."""
    recent_margins = RecentMargins()
    recent_margins.add([[2.0, 2.0]])
    high, low = recent_margins.gains(2, _taught(3.0, 0.0)), recent_margins.gains(2, _taught(-3.0, 0.0))
    assert (high > 0.8).all()
    assert (low < 0.1).all()


def test_few_trials_outweigh_what_was_before():
    """A drafter that was given up is judged by what was known when it was given up."""
    recent_margins = RecentMargins()
    for _ in range(300):
        recent_margins.add([_margins(0.1)])
    recent_margins.forget_old()
    for _ in range(10):
        recent_margins.add([_margins(0.9)])
    assert recent_margins.gains(1, _ESTIMATOR).mean() > 0.5


def test_undrafted_levels_decay_as_those_before():
    """Levels that were not drafted are worth nothing, so that blocks never grow; or as much as the first."""
    recent_margins = RecentMargins()
    recent_margins.add([_margins(0.8, 0.8)])
    recent_margins.add([_margins(0.5)])
    recent_margins.add([_margins(0.9, 0.9, 0.9, 0.1)])
    expected = [[0.8, 0.64, 0.512], [0.5, 0.25, 0.125], [0.9, 0.81, 0.729]]
    assert np.allclose(recent_margins.gains(3, _ESTIMATOR), expected)


def test_nothing_known_is_neither_hope_nor_despair():
    """A drafter nobody has seen yet is never tried, or counts as always right."""
    gains = RecentMargins().gains(4, AcceptanceEstimator())
    assert gains.shape == (1, 4)
    assert np.all((gains > 0) & (gains < 1))
    assert np.all(np.diff(gains) < 0)


def test_a_hopeless_block_has_gains():
    """Gains of zero give no number for the levels behind them."""
    recent_margins = RecentMargins()
    recent_margins.add([[0.0, 0.0]])
    gains = recent_margins.gains(4, _taught(-100.0, 0.0))
    assert ((gains >= 0) & (gains < 1e-40)).all()
