"""Where a scheduler's confidence comes from."""

from __future__ import annotations

import pytest
import torch

from dspark_hf.generation.scheduling import (
    AsynchronousScheduler,
    Batch,
    HardwareAwareScheduler,
    RoundOutcome,
    Schedule,
    ThresholdScheduler,
)
from dspark_hf.generation.scheduling.confidence import find_source
from tests.generation.scheduling.fakes import ListedCosts, block_of, new_call, new_drafter
from tests.thinning import mostly_slow

NUM_DRAFTS = 3
BATCH = Batch((NUM_DRAFTS,), 1)
COSTS = ListedCosts([1.0, 1.4, 1.8, 2.2])
ONLINE = {
    "threshold": ThresholdScheduler(0.6, confidence="online"),
    "hardware aware": HardwareAwareScheduler(costs=COSTS, confidence="online"),
    "asynchronous": AsynchronousScheduler(costs=COSTS, confidence="online"),
}


def _play(schedule: Schedule, *, is_right: bool, num_rounds: int = 1, margin: float = 2.0) -> list[int]:
    """Let a drafter be right or wrong in every draft; return how many were verified in each round."""
    verified = []
    for _ in range(num_rounds):
        margins = torch.full((1, NUM_DRAFTS), margin)
        counts = schedule.admit(block_of(torch.zeros(1, NUM_DRAFTS), margins), BATCH)
        schedule.observe(RoundOutcome(BATCH, NUM_DRAFTS, counts, counts if is_right else [0]))
        verified += counts
    return verified


@pytest.mark.parametrize("name", mostly_slow(ONLINE, ("asynchronous",)))
def test_bad_luck_does_not_end_verification(name):
    """What is never verified is never learnt: after some rejections a good drafter counts as bad for ever."""
    drafter = new_drafter()
    schedule = ONLINE[name].start(new_call(drafter=drafter, max_drafts=NUM_DRAFTS))
    assert sum(_play(schedule, is_right=False, num_rounds=40)) > 0
    assert _play(schedule, is_right=True, num_rounds=5) == [0] * 5
    # memory is of the drafter: the next call starts where this one ends
    schedule = ONLINE[name].start(new_call(drafter=drafter, max_drafts=NUM_DRAFTS))
    verified = _play(schedule, is_right=True, num_rounds=1000)
    assert verified[-20:] == [NUM_DRAFTS] * 20


@pytest.mark.parametrize("name", mostly_slow(ONLINE, ("threshold",)))
def test_a_bad_drafter_is_rarely_tried(name):
    """Looking again whether a drafter is still bad costs more than it can bring."""
    schedule = ONLINE[name].start(new_call(max_drafts=NUM_DRAFTS))
    _play(schedule, is_right=False, num_rounds=50)
    verified = _play(schedule, is_right=False, num_rounds=1000)
    assert 0 < sum(count > 0 for count in verified) <= 50


def test_a_drafter_that_is_never_sure_is_tried():
    """A drafter with small margins, which nothing is known of yet, is taken for a bad one for ever."""
    schedule = ONLINE["threshold"].start(new_call(max_drafts=NUM_DRAFTS))
    verified = _play(schedule, is_right=True, num_rounds=300, margin=0.0)
    assert verified[-20:] == [NUM_DRAFTS] * 20


def test_head_is_preferred_where_there_is_one():
    """A trained head is ignored, or a drafter without one cannot be scheduled."""
    source = find_source(None, new_call())
    confidence, margins = torch.full((1, 2), 0.125), torch.full((1, 2), 6.0)
    assert torch.equal(source.read(block_of(confidence, margins)), confidence)
    headless = block_of(confidence, margins)
    headless.confidence = None
    assert torch.equal(source.read(headless), find_source("online", new_call()).read(headless))
    assert source.wants_margins
    assert not find_source("head", new_call()).wants_margins


def test_head_teaches_the_estimator_nothing():
    """Margins of one block are taught with the outcomes of another, or those of a head with no margins at all."""
    call = new_call()
    source, online = find_source(None, call), find_source("online", call)
    block = block_of(torch.full((1, NUM_DRAFTS), 0.5), torch.full((1, NUM_DRAFTS), 3.0))
    before = online.read(block)
    source.read(block)
    source.learn(RoundOutcome(BATCH, NUM_DRAFTS, [3], [3]))
    assert torch.equal(online.read(block), before)


def test_missing_head_is_said():
    """A scheduler that was told to trust the head schedules at random, or fails without saying why."""
    block = block_of(torch.zeros(1, 2))
    block.confidence = None
    with pytest.raises(ValueError, match=r'`scheduler` must .*, got confidence=\'head\'\. Pass .*confidence="online"'):
        find_source("head", new_call()).read(block)


@pytest.mark.parametrize("scheduler", [ThresholdScheduler, HardwareAwareScheduler, AsynchronousScheduler])
def test_unknown_source_is_refused(scheduler):
    """A misspelt source is taken for the default."""
    with pytest.raises(ValueError, match=r"`confidence` must be one of \('head', 'online'\), got 'heads'\. Leave it"):
        scheduler(confidence="heads")
