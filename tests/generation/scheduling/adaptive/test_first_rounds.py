"""The default in its first rounds, when nothing was measured yet: it drafts, takes no great steps, errs briefly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dspark_hf.generation.drafting.lookup import Offer
from dspark_hf.generation.scheduling import AdaptiveScheduler, Batch, Schedule
from dspark_hf.generation.scheduling.costs.online import OnlineCosts
from dspark_hf.generation.scheduling.interface import Choice
from tests.generation.scheduling.fakes import new_call, new_drafter
from tests.generation.scheduling.machine import Machine, write
from tests.thinning import mostly_slow

MAX_DRAFTS, LONGEST = 5, 15
SURE, NOTHING = Offer((7,) * LONGEST, (0.99,) * LONGEST), Offer()


def _good(margin: float) -> float:
    return 1 / (1 + math.exp(-(0.5 + margin)))


def _wrong(margin: float) -> float:
    return 0.0


def _start(*, rates: list[float] | None = None) -> Schedule:
    drafter = new_drafter()
    drafter.accept_rates = rates
    return AdaptiveScheduler(costs=OnlineCosts()).start(new_call(drafter=drafter, max_drafts=MAX_DRAFTS))


@pytest.mark.parametrize("rates", [None, [0.8] * MAX_DRAFTS])
def test_the_first_round_drafts(rates):
    """A text begins with plain steps that nobody needs."""
    schedule = _start(rates=rates)
    text = write(schedule, Machine(), _good, 4, max_drafts=MAX_DRAFTS)
    assert all(text.num_drafted)


def test_a_drafter_that_was_evaluated_is_believed():
    """What a drafter has shown before does not count: a block of it is as long as a stranger's."""

    def first(rates: list[float]) -> int:
        schedule = _start(rates=rates)
        # so that width is no bar
        schedule.observe(Machine().outcome(Batch((LONGEST,), 1), 0, [LONGEST], [0]))
        schedule.observe(Machine().outcome(Batch((LONGEST,), 1), 0, [LONGEST], [0]))
        return schedule.num_drafts(Batch((MAX_DRAFTS,), 1))

    assert first([0.95] * MAX_DRAFTS) == MAX_DRAFTS
    assert first([0.6, 0.3, 0.1, 0.1, 0.1]) < 3


@pytest.mark.parametrize("disturbed", mostly_slow(range(8), (0, 1, 5)))
def test_one_disturbed_round_parks_no_good_drafter(disturbed):
    """Another program makes one of the first rounds slow, and a good drafter is left unused for a text."""
    machine, schedule = Machine(0.02, 0.0005, 0.002, 0.0003), _start()
    write(schedule, machine, _good, disturbed, max_drafts=MAX_DRAFTS)
    machine.mood = 4.0
    write(schedule, machine, _good, 1, max_drafts=MAX_DRAFTS, seed=1)
    machine.mood = 1.0
    assert write(schedule, machine, _good, 60, max_drafts=MAX_DRAFTS, seed=2).share_drafted() > 0.8


@pytest.mark.parametrize(("token_slope", "is_cheap"), [(0.0005, True), (0.004, False)])
def test_trees_wait_until_width_is_known_to_be_cheap(token_slope, is_cheap):
    """A text begins with trees, each two plain steps long where width is dear, only to learn that it is."""
    schedule = AdaptiveScheduler(costs=OnlineCosts()).start(replace(new_call(max_drafts=MAX_DRAFTS), may_branch=True))
    machine, batch, branches = Machine(token_slope=token_slope), Batch((MAX_DRAFTS,), 1), []
    while not any(branches) and len(branches) < 40:
        write(schedule, machine, _good, 1, max_drafts=MAX_DRAFTS)
        branches.append(schedule.num_branching(batch) > 0)
    # the first comparison with plain steps comes after four drafted rounds
    assert len(branches) > 4
    assert any(branches) == is_cheap


def _look_up(schedule: Schedule, machine: Machine) -> Choice:
    """Let a row that is offered sure drafts take a round, and return what it chose."""
    batch = Batch((MAX_DRAFTS,), 1, 10, (LONGEST,))
    choice = schedule.choose(batch, [SURE])
    verified = [sum(choice.num_looked_up)]
    outcome = machine.outcome(choice.limit(batch), 0, verified, verified)
    schedule.observe(outcome)
    schedule.compare(outcome)
    return choice


def test_no_pass_is_much_wider_than_those_before():
    """On a machine where width is dear, the first lookup costs a dozen steps."""
    schedule, machine = _start(), Machine()
    counts = [_look_up(schedule, machine).num_looked_up[0] for _ in range(6)]
    assert counts[0] == 3
    widest = 0
    for count in counts:
        assert count + 1 <= max(4, 2 * widest)
        widest = max(widest, count + 1)
    assert counts[-1] == LONGEST


def test_a_comparison_is_no_reason_to_look_up():
    """While a plain step is due, doubtful lookups take the place of a drafter that is better, round after round."""
    schedule, machine = _start(rates=[0.8] * MAX_DRAFTS), Machine(token_slope=0.0005)
    write(schedule, machine, _good, 3, max_drafts=MAX_DRAFTS)
    batch, doubtful, choices = Batch((MAX_DRAFTS,), 1, 10, (LONGEST,)), Offer((7,) * 4, (0.5,) * 4), []
    for _ in range(30):
        choice = schedule.choose(batch, [doubtful])
        choices.append(choice)
        if choice.num_drafts:
            # of this round nothing is to be learned but that it drafted
            write(schedule, machine, _good, 1, max_drafts=MAX_DRAFTS)
        else:
            looked_up = [sum(choice.num_looked_up)]
            schedule.observe(machine.outcome(choice.limit(batch), 0, looked_up, [0]))
    assert not any(choice.num_looked_up for choice in choices)
    assert 1 <= sum(not choice.num_drafts for choice in choices) < 6


def test_trials_wait_for_a_round_without_offers():
    """A parked drafter is tried where a lookup would have given more."""
    schedule, machine = _start(), Machine()
    write(schedule, machine, _wrong, 200, max_drafts=MAX_DRAFTS)
    assert schedule.parked_because is not None
    batch = Batch((MAX_DRAFTS,), 1, 10, (LONGEST,))
    while not schedule.choose(batch, [NOTHING]).num_drafts:
        schedule.observe(machine.outcome(batch, 0, [0], [0]))
    # a trial is due
    for _ in range(3):
        choice = _look_up(schedule, machine)
        assert choice.num_drafts == 0
        assert any(choice.num_looked_up)
    assert schedule.choose(batch, [NOTHING]).num_drafts


def test_a_drafter_is_not_asked_where_time_is_worth_more():
    """Beside lookups that give a dozen tokens at once, a drafter is run for half a token in a third of a step."""
    machine = Machine(0.02, 0.0005, 0.004, 0.0005)
    schedule = AdaptiveScheduler(costs=machine).start(new_call(max_drafts=MAX_DRAFTS))
    write(schedule, machine, lambda margin: 0.5, 120, max_drafts=MAX_DRAFTS)
    batch = Batch((MAX_DRAFTS,), 1, 10, (LONGEST,))
    # alone it pays
    assert schedule.choose(batch, [NOTHING]).num_drafts > 0
    for _ in range(60):
        _look_up(schedule, machine)
    assert schedule.choose(batch, [NOTHING]).num_drafts == 0


def test_a_good_offer_is_not_cut_short_for_good():
    """A few disturbed rounds make wide passes look dear, and no text is looked up further than two tokens again."""
    schedule, machine = _start(), Machine()
    for _ in range(10):
        # whatever is wide is slow
        machine.token_slope = 0.05
        _look_up(schedule, machine)
    machine.token_slope = 0.0005
    counts = [sum(_look_up(schedule, machine).num_looked_up) for _ in range(60)]
    assert sum(count == LONGEST for count in counts) > 30
