"""Costs learnt from rounds, on a machine whose costs are known."""

from __future__ import annotations

import random

import pytest

from dspark_hf.generation.scheduling import Batch, RoundOutcome
from dspark_hf.generation.scheduling.costs.online import OnlineCosts, round_seconds
from tests.generation.scheduling.fakes import ListedCosts
from tests.generation.scheduling.machine import Machine
from tests.thinning import mostly_slow

CONTEXT = 100


def _run(machine: Machine, rows: int, count: int, **options: float) -> RoundOutcome:
    batch = Batch((count,) * rows, rows, CONTEXT)
    return machine.outcome(batch, count, [count] * rows, [0] * rows, **options)


def _learn(costs: OnlineCosts, machine: Machine, rows: int, counts: tuple[int, ...], num_times: int = 10) -> None:
    for _ in range(num_times):
        for count in counts:
            costs.observe(_run(machine, rows, count))


@pytest.mark.parametrize("rows", [1, 4])
def test_measured_shapes_are_known(rows):
    """Costs of shapes that were measured, or that lie between them, are not what they were."""
    costs, machine = OnlineCosts(), Machine(noise=0.1, start_up=5.0)
    _learn(costs, machine, rows, (0, 2, 5), 30)
    for count in range(6):
        assert costs.verify_seconds(rows, 1 + count, CONTEXT) == pytest.approx(
            machine.verify_seconds(rows, 1 + count), rel=0.1
        )
    for count in range(2, 6):
        assert costs.draft_seconds(rows, count, CONTEXT) == pytest.approx(machine.draft_seconds(rows, count), rel=0.1)


def test_first_pass_of_a_shape_does_not_count():
    """Compiling a kernel is taken for the cost of a pass, and drafting seems never to pay."""
    costs, machine = OnlineCosts(), Machine(start_up=5.0)
    _learn(costs, machine, 1, (0, 3), 3)
    # what is believed of slopes beforehand still shows
    assert costs.verify_seconds(1, 4, CONTEXT) == pytest.approx(machine.verify_seconds(1, 4), rel=0.03)
    assert costs.verify_seconds(1, 1, CONTEXT) == pytest.approx(machine.verify_seconds(1, 1), rel=0.03)


def test_rounds_that_catch_up_do_not_count():
    """Reading what parked rounds left is taken for the cost of drafting."""
    costs, machine = OnlineCosts(), Machine()
    _learn(costs, machine, 1, (0, 3), 5)
    for _ in range(20):
        costs.observe(_run(machine, 1, 3, reading=1.0))
    assert costs.draft_seconds(1, 3, CONTEXT) == pytest.approx(machine.draft_seconds(1, 3))


def test_costs_are_known_once_both_kinds_of_rounds_are():
    """A decision is made on costs that were never measured."""
    costs, machine = OnlineCosts(), Machine()
    assert not costs.knows(1)
    _learn(costs, machine, 1, (0,), 10)
    assert not costs.knows(1)
    _learn(costs, machine, 1, (3,), 10)
    assert costs.knows(1)
    drafted_only = OnlineCosts()
    _learn(drafted_only, machine, 1, (3,), 10)
    assert not drafted_only.knows(1)


def test_an_outlier_does_not_count():
    """One interrupted round makes its shape look slow."""
    costs, machine = OnlineCosts(), Machine()
    _learn(costs, machine, 1, (0, 3), 10)
    machine.mood = 50.0
    costs.observe(_run(machine, 1, 3))
    machine.mood = 1.0
    _learn(costs, machine, 1, (0, 3), 2)
    assert costs.verify_seconds(1, 4, CONTEXT) == pytest.approx(machine.verify_seconds(1, 4), rel=0.2)


@pytest.mark.parametrize("mood", [0.4, 3.0])
def test_a_change_of_the_machine_changes_all_costs(mood):
    """Shapes seen before the machine changed cost what they did, beside those seen since."""
    costs, machine = OnlineCosts(), Machine()
    _learn(costs, machine, 1, (0, 5), 20)
    machine.mood = mood
    # only plain rounds are seen from now on
    _learn(costs, machine, 1, (0,), 40)
    for width in (1, 6):
        assert costs.verify_seconds(1, width, CONTEXT) == pytest.approx(machine.verify_seconds(1, width), rel=0.05)
    assert costs.draft_seconds(1, 5, CONTEXT) == pytest.approx(machine.draft_seconds(1, 5), rel=0.05)


PROFILE = ListedCosts([1.0, 1.1, 1.2, 2.0, 2.1, 2.2], [0.1, 0.12, 0.14, 0.16, 0.18])


def test_a_profile_is_believed_from_the_start():
    """What was measured beforehand is learnt anew in every process."""
    costs = OnlineCosts(PROFILE)
    assert costs.knows(1)
    assert [costs.verify_seconds(1, width, CONTEXT) for width in range(1, 7)] == pytest.approx(PROFILE.verify)
    assert [costs.draft_seconds(1, count, CONTEXT) for count in range(1, 6)] == pytest.approx(PROFILE.draft)


def test_rounds_scale_a_profile():
    """On a machine that is slower than when it was profiled, shapes not seen yet look fast."""
    costs = OnlineCosts(PROFILE)
    for _ in range(20):
        costs.observe(RoundOutcome(Batch((5,), 1, CONTEXT), 0, [0], [0], 0.0, 3.0))
    assert [costs.verify_seconds(1, width, CONTEXT) for width in (1, 4, 6)] == pytest.approx([3.0, 6.0, 6.6], rel=0.02)
    assert costs.draft_seconds(1, 5, CONTEXT) == pytest.approx(3 * 0.18, rel=0.02)


def test_rounds_overrule_a_profile():
    """A profile of another machine, or of another load, is believed for ever."""
    costs = OnlineCosts(PROFILE)
    for number in range(200):
        # a drafting run with a plain step now and then
        if number % 10 == 0:
            costs.observe(RoundOutcome(Batch((5,), 1, CONTEXT), 0, [0], [0], 0.0, 1.0))
        else:
            costs.observe(RoundOutcome(Batch((5,), 1, CONTEXT), 5, [5], [0], 0.5, 4.4))
    wide, plain = costs.verify_seconds(1, 6, CONTEXT), costs.verify_seconds(1, 1, CONTEXT)
    assert wide / plain == pytest.approx(4.4, rel=0.15)
    assert costs.draft_seconds(1, 5, CONTEXT) / plain == pytest.approx(0.5, rel=0.2)


def test_other_numbers_of_rows_are_told_by_tokens():
    """A batch of a new size has no cost, or one that falls with its width."""
    costs, machine = OnlineCosts(), Machine()
    _learn(costs, machine, 2, (0, 1, 3, 5), 5)
    for rows in (1, 3, 4):
        seconds = [costs.verify_seconds(rows, width, CONTEXT) for width in range(1, 7)]
        assert all(0 < low <= high for low, high in zip(seconds, seconds[1:], strict=False))
        drafting = [costs.draft_seconds(rows, count, CONTEXT) for count in range(1, 6)]
        assert all(0 < low <= high for low, high in zip(drafting, drafting[1:], strict=False))


@pytest.mark.parametrize("seed", mostly_slow(range(20), range(5)))
def test_no_step_is_free(seed):
    """Lines and bends lead below zero, and a plan takes all it can get for nothing."""
    draw = random.Random(seed)
    profile = ListedCosts([draw.uniform(0.005, 0.05) for _ in range(6)], [draw.uniform(0.005, 0.05) for _ in range(5)])
    for costs in (OnlineCosts(profile), OnlineCosts()):
        for count in (0, 0, *draw.choices(range(6), k=40)):
            batch = Batch((5,), 1, CONTEXT)
            seconds = draw.uniform(0.001, 0.005) if count < 3 else draw.uniform(0.05, 0.5)
            costs.observe(RoundOutcome(batch, count, [count], [0], draw.uniform(0.001, 0.1) * count, seconds))
        for rows in (1, 2):
            assert all(costs.verify_seconds(rows, width, CONTEXT) > 0 for width in range(1, 7))
            assert all(costs.draft_seconds(rows, count, CONTEXT) > 0 for count in range(1, 6))


def _in_tiles(rows: int, width: int) -> float:
    """Return the seconds of a machine whose kernels like multiples of eight tokens."""
    tokens = rows * width
    return 0.05 + 0.002 * tokens + (0.0 if tokens % 8 == 0 else 0.03)


def test_a_wider_pass_may_be_cheaper():
    """What kernels gain by whole tiles is smoothed away."""
    costs = OnlineCosts()
    for _ in range(60):
        for width in (1, 2, 3, 4):
            batch = Batch((3,) * 4, 4, CONTEXT)
            costs.observe(RoundOutcome(batch, width - 1, [width - 1] * 4, [0] * 4, 0.01, _in_tiles(4, width)))
    for width in (1, 2, 3, 4):
        assert costs.verify_seconds(4, width, CONTEXT) == pytest.approx(_in_tiles(4, width), rel=0.05)
    # three rows of four are twelve tokens, as four rows of three are
    assert costs.verify_seconds(3, 4, CONTEXT) == pytest.approx(_in_tiles(3, 4), rel=0.05)
    assert costs.verify_seconds(8, 1, CONTEXT) == pytest.approx(_in_tiles(8, 1), rel=0.05)


def test_few_drafts_are_cheaper_than_many_before_both_were_measured():
    """With one number of drafts measured all of them cost the same, or nothing."""
    costs, machine = OnlineCosts(), Machine()
    _learn(costs, machine, 1, (0, 5), 5)
    assert 0 < costs.draft_seconds(1, 1, CONTEXT) < costs.draft_seconds(1, 5, CONTEXT)


def test_a_round_costs_its_drafts_and_its_pass():
    """Seconds of a round leave out the drafter, or count it where nothing was drafted."""
    costs, batch = ListedCosts([1.0, 2.0, 4.0], [0.25, 0.5]), Batch((2, 1), 2)
    seconds = round_seconds(costs, batch, 2)
    assert [seconds(level) for level in range(3)] == [1.5, 2.5, 4.5]
    assert round_seconds(costs, batch, 0)(0) == 1.0
