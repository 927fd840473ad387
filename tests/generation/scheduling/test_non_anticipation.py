"""No draft decides whether it is verified itself: what depends on a draft changes nothing about it.

The confidence and the margin of slot k depend on the drafts before k. A row's first unverified draft is `counts[row]`,
so what may have decided about the row is known up to that slot; what lies behind it may be anything.

b rows, K drafts.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling import (
    AdaptiveScheduler,
    AsynchronousScheduler,
    Batch,
    CallInfo,
    FixedScheduler,
    HardwareAwareScheduler,
    RoundOutcome,
    Schedule,
    Scheduler,
    ThresholdScheduler,
)
from dspark_hf.generation.scheduling.costs.online import OnlineCosts
from tests.generation.scheduling.fakes import ListedCosts, block_of, new_call
from tests.generation.scheduling.retrospective import RetrospectiveScheduler
from tests.thinning import mostly_slow

NUM_CASES = 25
MOST_ROUNDS = 25
NUM_ROWS = 3
NUM_DRAFTS = 5
# stairs, which a search over all widths looks past
STAIRS = [1.0, 1.3, 1.5, 1.9, 2.0, 2.5]
GENTLE = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
STEEP = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]

SCHEDULERS: dict[str, Callable[[], Scheduler]] = {
    "fixed": FixedScheduler,
    "threshold, head": lambda: ThresholdScheduler(0.6, confidence="head"),
    "threshold, online": lambda: ThresholdScheduler(0.6, confidence="online"),
    "hardware aware, head": lambda: HardwareAwareScheduler(costs=ListedCosts(STAIRS), confidence="head"),
    "hardware aware, online": lambda: HardwareAwareScheduler(costs=ListedCosts(STAIRS), confidence="online"),
    "asynchronous, head": lambda: AsynchronousScheduler(costs=ListedCosts(STAIRS), confidence="head"),
    "asynchronous, online": lambda: AsynchronousScheduler(costs=ListedCosts(STAIRS), confidence="online"),
    "adaptive, stairs": lambda: AdaptiveScheduler(costs=ListedCosts(STAIRS)),
    "adaptive, drafting": lambda: AdaptiveScheduler(costs=ListedCosts(GENTLE)),
    "adaptive, parked": lambda: AdaptiveScheduler(costs=ListedCosts(STEEP)),
    "adaptive, learning costs": lambda: AdaptiveScheduler(costs=OnlineCosts()),
}
# no block changes what they verify
ALWAYS_THE_SAME = ("fixed", "adaptive, parked")
# what a head says takes the same way to a decision as what is learnt, and told costs the same as learnt ones
QUICK = ("threshold, online", "hardware aware, online", "asynchronous, online", "adaptive, stairs")


def _random_block(draw: random.Random, num_drafts: int) -> DraftedBlock:
    """Return an easy, a mixed or a hard block, so that there is something to decide."""
    ease = draw.choice([0.05, 0.4, 1.5])
    sure = torch.tensor([[draw.random() ** ease for _ in range(num_drafts)] for _ in range(NUM_ROWS)])
    # margins from which an estimator would tell the same: logits of confidence
    return block_of(sure, (sure / (1 - sure).clamp_min(1e-3)).log().add(1).clamp(0, 8))


def _random_batch(draw: random.Random) -> Batch:
    limits = [NUM_DRAFTS if draw.random() < 0.7 else draw.randint(0, NUM_DRAFTS) for _ in range(NUM_ROWS)]
    limits[draw.randrange(NUM_ROWS)] = NUM_DRAFTS
    return Batch(tuple(limits), sum(limit > 0 for limit in limits))


def _play_round(schedule: Schedule, draw: random.Random) -> None:
    batch = _random_batch(draw)
    num_drafts = schedule.num_drafts(batch)
    num_verified, num_accepted = [0] * NUM_ROWS, [0] * NUM_ROWS
    if num_drafts:
        block = _random_block(draw, num_drafts)
        assert block.confidence is not None
        num_verified = schedule.admit(block, batch)
        for row, chances in enumerate(block.confidence.tolist()):
            while num_accepted[row] < num_verified[row] and draw.random() < chances[num_accepted[row]]:
                num_accepted[row] += 1
    # times that drafting is worth, where the schedule measures them
    seconds = 1.0 + 0.01 * max(num_verified)
    schedule.observe(RoundOutcome(batch, num_drafts, num_verified, num_accepted, 0.01 * num_drafts, seconds))


def _cases(scheduler: Callable[[], Scheduler], call: Callable[[], CallInfo]):
    """Yield schedules in the middle of a call, a batch and a block of theirs; each schedule decides once."""
    draw = random.Random(1)
    num_cases = 0
    while num_cases < NUM_CASES:
        schedule = scheduler().start(call())
        for _ in range(draw.randint(0, MOST_ROUNDS)):
            _play_round(schedule, draw)
        batch = _random_batch(draw)
        num_drafts = schedule.num_drafts(batch)
        # a parked schedule has no decision to make
        if num_drafts:
            num_cases += 1
            yield draw, schedule, batch, _random_block(draw, num_drafts)


def _decide(schedule: Schedule, block: DraftedBlock, batch: Batch) -> list[int]:
    return copy.deepcopy(schedule).admit(block, batch)


def _changed_behind(block: DraftedBlock, last_known: list[int], other: DraftedBlock) -> DraftedBlock:
    """Return `block` with what `other` says of each row's slots behind `last_known[row]`."""
    assert block.confidence is not None and block.margins is not None
    assert other.confidence is not None and other.margins is not None
    is_known = torch.arange(block.token_ids.shape[1]) <= torch.tensor(last_known)[:, None]

    def mixed(ours: Tensor, theirs: Tensor) -> Tensor:
        return ours.where(is_known, theirs)

    return block_of(mixed(block.confidence, other.confidence), mixed(block.margins, other.margins))


def _row_is_ruled_by_its_own_drafts(scheduler: Callable[[], Scheduler]) -> bool:
    """Return whether a change behind a draft, in its row, ever changes that it is verified, or that it is not."""
    for draw, schedule, batch, block in _cases(scheduler, _new_call):
        before = _decide(schedule, block, batch)
        for row in range(NUM_ROWS):
            for slot in range(block.token_ids.shape[1]):
                last_known = [NUM_DRAFTS] * NUM_ROWS
                last_known[row] = slot
                other = _random_block(draw, block.token_ids.shape[1])
                after = _decide(schedule, _changed_behind(block, last_known, other), batch)
                if (after[row] > slot) != (before[row] > slot):
                    return True
    return False


def _batch_is_ruled_by_unverified_drafts(scheduler: Callable[[], Scheduler]) -> bool:
    """Return whether changes behind the last verified drafts, in all rows at once, ever change the decision."""
    for draw, schedule, batch, block in _cases(scheduler, _new_call):
        counts = _decide(schedule, block, batch)
        for _ in range(5):
            other = _random_block(draw, block.token_ids.shape[1])
            if _decide(schedule, _changed_behind(block, counts, other), batch) != counts:
                return True
    return False


def _new_call() -> CallInfo:
    return new_call(num_rows=NUM_ROWS, max_drafts=NUM_DRAFTS)


class _Circular(Scheduler, Schedule):
    """Verify a row if the other rows' last drafts are confident."""

    name = "circular"

    def start(self, call: CallInfo) -> Schedule:
        return self

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        assert drafted.confidence is not None
        is_sure = (drafted.confidence[:, -1] > 0.7).tolist()
        return [limit * is_sure[row - 1] for row, limit in enumerate(batch.limits)]


@pytest.mark.parametrize("name", mostly_slow(SCHEDULERS, QUICK))
def test_a_draft_does_not_decide_about_itself(name):
    """What a draft leads to decides whether it is verified: sampled text no longer follows the target."""
    assert not _row_is_ruled_by_its_own_drafts(SCHEDULERS[name])


@pytest.mark.parametrize("name", mostly_slow(SCHEDULERS, QUICK))
def test_the_batch_is_decided_by_verified_drafts(name):
    """A draft that is not verified decides about other rows' drafts, and they about it."""
    assert not _batch_is_ruled_by_unverified_drafts(SCHEDULERS[name])


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ALWAYS_THE_SAME])
def test_decisions_do_depend_on_the_block(name):
    """The tests above hold of a scheduler that ignores the block, and say nothing of this one."""
    for draw, schedule, batch, block in _cases(SCHEDULERS[name], _new_call):
        if _decide(schedule, block, batch) != _decide(schedule, _random_block(draw, block.token_ids.shape[1]), batch):
            return
    pytest.fail("no decision depends on the block")


def test_a_search_over_the_current_round_is_found_out():
    """The tests above pass whatever a scheduler looks at."""
    retrospective = RetrospectiveScheduler(ListedCosts(STAIRS))
    assert _row_is_ruled_by_its_own_drafts(lambda: retrospective)
    assert _batch_is_ruled_by_unverified_drafts(lambda: retrospective)


def test_rows_that_decide_about_each_other_are_found_out():
    """The test of batches finds no more than the test of single rows: texts of several rows may be correlated."""
    assert not _row_is_ruled_by_its_own_drafts(_Circular)
    assert _batch_is_ruled_by_unverified_drafts(_Circular)
