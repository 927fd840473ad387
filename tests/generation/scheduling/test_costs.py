"""Costs learnt from rounds, on a machine whose costs are known."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from dspark_hf.generation.scheduling import Batch, Outcome
from dspark_hf.generation.scheduling.costs import OnlineCosts, round_seconds
from tests.generation.scheduling.fakes import ListedCosts

CONTEXT = 100


@dataclass
class Machine:
    """Rounds that cost what a formula says, times a mood, with some noise, and once more at the first time."""

    verify_base: float = 0.02
    verify_slope: float = 0.002
    draft_base: float = 0.004
    draft_slope: float = 0.001
    row_share: float = 0.1
    mood: float = 1.0
    noise: float = 0.0
    start_up: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    seen: set[tuple[int, int, int]] = field(default_factory=set)

    def verify(self, rows: int, width: int) -> float:
        return self.mood * (1 + self.row_share * (rows - 1)) * (self.verify_base + self.verify_slope * (width - 1))

    def draft(self, rows: int, count: int) -> float:
        return self.mood * (1 + self.row_share * (rows - 1)) * (self.draft_base + self.draft_slope * count)

    def run(self, rows: int, num_drafts: int, num_verified: int, *, is_typical: bool = True) -> Outcome:
        shape = (rows, num_drafts, num_verified)
        extra = 0.0 if shape in self.seen else self.start_up
        self.seen.add(shape)
        shake = 1 + self.noise * self.draw.uniform(-1, 1)
        return Outcome(
            Batch((num_drafts,) * rows, rows, CONTEXT),
            num_drafts,
            [num_verified] * rows,
            [0] * rows,
            self.draft(rows, num_drafts) * shake if num_drafts else 0.0,
            self.verify(rows, 1 + num_verified) * shake + extra,
            is_typical,
        )


def _learn(costs: OnlineCosts, machine: Machine, rows: int, counts: tuple[int, ...], num_times: int = 10) -> None:
    for _ in range(num_times):
        for count in counts:
            costs.observe(machine.run(rows, count, count))


@pytest.mark.parametrize("rows", [1, 4])
def test_measured_shapes_are_known(rows):
    """Costs of shapes that were measured, or that lie between them, are not what they were."""
    costs, machine = OnlineCosts(), Machine(noise=0.1, start_up=5.0)
    _learn(costs, machine, rows, (0, 2, 5), 30)
    for count in range(6):
        assert costs.verify_seconds(rows, 1 + count, CONTEXT) == pytest.approx(
            machine.verify(rows, 1 + count), rel=0.1
        )
    for count in range(2, 6):
        assert costs.draft_seconds(rows, count, CONTEXT) == pytest.approx(machine.draft(rows, count), rel=0.1)


def test_first_pass_of_a_shape_does_not_count():
    """Compiling a kernel is taken for the cost of a pass, and drafting seems never to pay."""
    costs, machine = OnlineCosts(), Machine(start_up=5.0)
    _learn(costs, machine, 1, (0, 3), 3)
    assert costs.verify_seconds(1, 4, CONTEXT) == pytest.approx(machine.verify(1, 4))
    assert costs.verify_seconds(1, 1, CONTEXT) == pytest.approx(machine.verify(1, 1))


def test_rounds_that_catch_up_do_not_count():
    """Reading what parked rounds left is taken for the cost of drafting."""
    costs, machine = OnlineCosts(), Machine()
    _learn(costs, machine, 1, (0, 3), 5)
    before = costs.draft_seconds(1, 3, CONTEXT), costs.verify_seconds(1, 4, CONTEXT)
    machine.mood = 10.0
    for _ in range(20):
        costs.observe(machine.run(1, 3, 3, is_typical=False))
    assert (costs.draft_seconds(1, 3, CONTEXT), costs.verify_seconds(1, 4, CONTEXT)) == before


def test_costs_are_known_once_both_kinds_of_rounds_are():
    """A decision is made on costs that were never measured."""
    costs, machine = OnlineCosts(), Machine()
    assert not costs.is_known
    _learn(costs, machine, 1, (0,), 10)
    assert not costs.is_known
    _learn(costs, machine, 1, (3,), 10)
    assert costs.is_known
    drafted_only = OnlineCosts()
    _learn(drafted_only, machine, 1, (3,), 10)
    assert not drafted_only.is_known


def test_an_outlier_does_not_count():
    """One interrupted round makes its shape look slow."""
    costs, machine = OnlineCosts(), Machine()
    _learn(costs, machine, 1, (0, 3), 10)
    machine.mood = 50.0
    costs.observe(machine.run(1, 3, 3))
    machine.mood = 1.0
    _learn(costs, machine, 1, (0, 3), 2)
    assert costs.verify_seconds(1, 4, CONTEXT) == pytest.approx(machine.verify(1, 4), rel=0.2)


@pytest.mark.parametrize("mood", [0.6, 1.7])
def test_a_change_of_the_machine_changes_all_costs(mood):
    """Shapes seen before the machine changed cost what they did, beside those seen since."""
    costs, machine = OnlineCosts(), Machine()
    _learn(costs, machine, 1, (0, 5), 20)
    machine.mood = mood
    # only plain rounds are seen from now on
    _learn(costs, machine, 1, (0,), 40)
    assert costs.verify_seconds(1, 1, CONTEXT) == pytest.approx(machine.verify(1, 1), rel=0.05)
    # part of the change is taken for one of plain rounds alone
    assert costs.verify_seconds(1, 6, CONTEXT) == pytest.approx(machine.verify(1, 6), rel=0.2)
    assert costs.draft_seconds(1, 5, CONTEXT) == pytest.approx(machine.draft(1, 5), rel=0.2)


def test_other_numbers_of_rows_are_told_by_tokens():
    """A batch of a new size has no cost, or one that falls with its width."""
    costs, machine = OnlineCosts(), Machine()
    _learn(costs, machine, 2, (0, 1, 3, 5), 5)
    for rows in (1, 3, 4):
        seconds = [costs.verify_seconds(rows, width, CONTEXT) for width in range(1, 7)]
        assert all(0 < low <= high for low, high in zip(seconds, seconds[1:], strict=False))
        drafting = [costs.draft_seconds(rows, count, CONTEXT) for count in range(1, 6)]
        assert all(0 < low <= high for low, high in zip(drafting, drafting[1:], strict=False))


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
