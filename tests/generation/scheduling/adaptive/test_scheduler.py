"""The adaptive scheduler on a simulated machine: it drafts where that pays, and hardly where it does not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache

import pytest
import torch

from dspark_hf.generation.drafting.interface import DraftedBlock, Drafter
from dspark_hf.generation.drafting.lookup import Offer
from dspark_hf.generation.scheduling import AdaptiveScheduler, Batch, FixedScheduler, RoundOutcome, Schedule
from dspark_hf.generation.scheduling.costs.online import Costs, OnlineCosts
from dspark_hf.generation.scheduling.defaults import PLAN_EVERY
from tests.generation.scheduling.fakes import ListedCosts, block_of, new_call, new_drafter
from tests.generation.scheduling.machine import Machine, Text, write
from tests.thinning import mostly_slow, slow

MAX_DRAFTS = 5


# an accelerator, on which width is nearly free, and processors, on which it is not
MACHINES: dict[str, Callable[[], Machine]] = {
    "accelerator": lambda: Machine(0.02, 0.0001, 0.002, 0.0003),
    "processor": lambda: Machine(0.02, 0.004, 0.004, 0.001),
}


def _wrong(margin: float) -> float:
    return 0.0


def _poor(margin: float) -> float:
    return 0.25


def _good(margin: float) -> float:
    return 1 / (1 + math.exp(-(0.5 + margin)))


def _mixed(margin: float) -> float:
    return 1 / (1 + math.exp(-(-2.0 + 1.2 * margin)))


def _start(
    machine: Machine, *, drafter: Drafter | None = None, costs: Costs | None = None, num_rows: int = 1
) -> Schedule:
    """Return a schedule that knows the machine, or learns what it costs if `costs` are to be learnt."""
    call = new_call(drafter=drafter, num_rows=num_rows, max_drafts=MAX_DRAFTS)
    return AdaptiveScheduler(costs=costs or machine).start(call)


class _Cut(Schedule):
    """Draft and verify a fixed number."""

    def __init__(self, count: int):
        self.count = count

    def num_drafts(self, batch: Batch) -> int:
        return self.count

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        return batch.cut(self.count)


@cache
def _best_fixed_rate(name: str, chance: Callable[[float], float], num_rows: int = 1) -> float:
    texts = [write(_Cut(count), MACHINES[name](), chance, 1000, num_rows=num_rows) for count in range(MAX_DRAFTS + 1)]
    return max(text.rate for text in texts)


def _plain_rate(machine: Machine, num_rows: int = 1) -> float:
    return num_rows / machine.verify_seconds(num_rows, 1)


@pytest.mark.parametrize(("learns", "num_rows"), [(True, 1), (False, 4)])
@pytest.mark.parametrize("name", MACHINES)
def test_a_useless_drafter_is_parked(name, learns, num_rows):
    """Text with a drafter that is always wrong takes longer than text without."""
    machine = MACHINES[name]()
    schedule = _start(machine, costs=OnlineCosts() if learns else None, num_rows=num_rows)
    text = write(schedule, machine, _wrong, 2000, num_rows=num_rows)
    # the first rounds find out
    assert text.share_drafted(100) < 0.02
    assert text.rate > 0.97 * _plain_rate(machine, num_rows)
    # it is looked at again now and then
    assert text.share_drafted(1000) > 0


@pytest.mark.parametrize(
    ("name", "chance", "learns", "num_rows"),
    [
        slow("accelerator", _good, True, 1),
        slow("accelerator", _mixed, False, 4),
        slow("processor", _mixed, True, 1),
        slow("processor", _good, False, 4),
        slow("accelerator", _mixed, True, 1),
        slow("accelerator", _good, False, 4),
        ("processor", _good, True, 1),
        slow("processor", _mixed, False, 4),
    ],
)
def test_text_is_written_nearly_as_fast_as_can_be(name, chance, learns, num_rows):
    """A fixed number of drafts, or none, is faster than the default."""
    machine = MACHINES[name]()
    schedule = _start(machine, costs=OnlineCosts() if learns else None, num_rows=num_rows)
    text = write(schedule, machine, chance, 1000, num_rows=num_rows)
    assert text.rate > 0.95 * _best_fixed_rate(name, chance, num_rows)


def test_blocks_are_cut_where_they_get_doubtful():
    """Margins tell good drafts from bad ones, and nobody listens: on such a machine cutting pays."""
    machine = MACHINES["processor"]()
    text = write(_start(machine), machine, _mixed, 1000)
    assert text.rate > 1.02 * _best_fixed_rate("processor", _mixed)
    assert len(set(text.num_verified)) > 3


def test_a_drafter_that_turns_good_is_found():
    """A drafter that was useless for one text is given up for all."""
    machine = MACHINES["accelerator"]()
    schedule = _start(machine)
    write(schedule, machine, _wrong, 600)
    text = write(schedule, machine, _good, 800)
    assert text.share_drafted(600) > 0.9


def test_a_drafter_that_turns_bad_is_parked():
    """A drafter that was good for one text is trusted for ever."""
    machine = MACHINES["processor"]()
    schedule = _start(machine)
    assert write(schedule, machine, _good, 600).share_drafted(100) > 0.9
    # every wrong block is one draft against hundreds that were right
    assert write(schedule, machine, _wrong, 800).share_drafted(400) < 0.05


def test_the_next_call_knows():
    """Every call tries a useless drafter anew, or learns the machine's costs again."""
    machine, drafter, costs = MACHINES["processor"](), new_drafter(), OnlineCosts()
    write(_start(machine, drafter=drafter, costs=costs), machine, _wrong, 500)
    text = write(_start(machine, drafter=drafter, costs=costs), machine, _wrong, 100)
    assert text.share_drafted() < 0.04


def test_shrinking_batches():
    """What did not pay for many rows is not tried for the few that are left, or the other way round."""
    # tokens are dear: eight rows fill the machine
    machine = Machine(0.01, 0.003, 0.002, 0.0003)
    schedule = _start(machine, num_rows=8)
    many = write(schedule, machine, _mixed, 400, num_rows=8)
    few = write(schedule, machine, _mixed, 400, num_rows=1)
    assert many.share_drafted(100) < 0.1
    assert few.share_drafted(100) > 0.9


def test_costs_are_learnt_soon():
    """A process makes trials of shapes for longer than a text lasts."""
    machine = Machine(noise=0.1, start_up=3.0)
    costs = OnlineCosts()
    write(_start(machine, costs=costs), machine, _good, 12)
    assert costs.knows(1)


def test_noise_does_not_turn_drafting_off():
    """One slow round makes a good drafter look bad."""
    machine = Machine(0.02, 0.0001, 0.002, 0.0003, noise=0.3)
    text = write(_start(machine, costs=OnlineCosts()), machine, _good, 800)
    assert text.share_drafted(100) > 0.9


@pytest.mark.parametrize("seed", mostly_slow(range(4), (0,)))
def test_disturbed_rounds_do_not_turn_drafting_off(seed):
    """Now and then another program makes a round slow; the mean of the rounds is compared with a usual plain step."""
    machine = Machine(0.02, 0.002, 0.004, 0.0005, disturbed=0.15, draw=random.Random(seed))
    text = write(_start(machine, costs=OnlineCosts(), num_rows=4), machine, _good, 300, num_rows=4, seed=seed)
    assert text.share_drafted(50) > 0.9


@pytest.mark.parametrize("seed", mostly_slow(range(4), (0, 1)))
def test_a_slow_start_is_not_believed_for_long(seed):
    """The first plain steps are disturbed, and whatever is drafted seems quick beside them from then on."""
    machine = Machine(0.077, 0.0077, 0.02, 0.004, noise=0.05, draw=random.Random(seed))
    schedule = _start(machine, costs=OnlineCosts(), num_rows=4)
    machine.mood = 2.5
    write(schedule, machine, _poor, 2, num_rows=4)
    machine.mood = 1.0
    first, later = (write(schedule, machine, _poor, 60, num_rows=4, seed=seed) for _ in range(2))
    assert first.rate > 0.75 * _plain_rate(machine, 4)
    assert later.rate > 0.95 * _plain_rate(machine, 4)


def test_no_pass_over_drafts_beats_a_plain_step_by_itself():
    """Noise makes wide passes look quicker than plain steps, and hopeless drafts are made for their sake."""
    drafter, known = new_drafter(), MACHINES["processor"]()
    write(_start(known, drafter=drafter), known, _wrong, 400)
    # given up for single rows only: for four, nothing but the plan stands against drafts
    machine = Machine(1.0, -0.01, 0.35, 0.0)
    text = write(_start(machine, drafter=drafter, num_rows=4), machine, _wrong, 16, num_rows=4)
    assert text.num_drafted == [0] * 16


def test_a_slower_machine_changes_nothing():
    """Costs seen before another program started are compared with those seen since."""
    machine = MACHINES["accelerator"]()
    schedule = _start(machine, costs=OnlineCosts())
    write(schedule, machine, _good, 300)
    machine.mood = 3.0
    assert write(schedule, machine, _good, 300).share_drafted(100) > 0.9
    useless = _start(machine, costs=OnlineCosts())
    write(useless, machine, _wrong, 300)
    machine.mood = 1.0
    assert write(useless, machine, _wrong, 300).share_drafted() < 0.05


@pytest.mark.parametrize("learns", [False, True])
def test_no_room_means_no_drafts(learns):
    """Drafts are made that no row can use."""
    machine = MACHINES["accelerator"]()
    schedule = _start(machine, costs=OnlineCosts() if learns else None)
    write(schedule, machine, _good, 50)
    assert schedule.num_drafts(Batch((0, 0), 2)) == 0
    schedule.observe(machine.outcome(Batch((0, 0), 2), 0, [0, 0], [0, 0]))
    assert 0 <= schedule.num_drafts(Batch((1, 0), 2)) <= 1


def test_rows_at_their_end_do_not_count():
    """Rows that cannot use a block make its drafter look bad."""
    schedule = _start(Machine(), costs=ListedCosts([1.0] * 6))
    batch = Batch((MAX_DRAFTS, 0, 1), 2)
    for _ in range(60):
        count = schedule.num_drafts(batch)
        verified = schedule.admit(block_of(torch.zeros(3, count), torch.full((3, count), 5.0)), batch) if count else []
        verified = verified or [0, 0, 0]
        schedule.observe(RoundOutcome(batch, count, verified, verified, 1e-3, 1.0))
    assert schedule.num_drafts(Batch((MAX_DRAFTS,), 1)) == MAX_DRAFTS


def test_fixed_scheduler_is_what_a_cut_is():
    """The baseline of this file is not one that a user can choose."""
    fixed = FixedScheduler().start(new_call(max_drafts=MAX_DRAFTS))
    machine = MACHINES["accelerator"]
    ours: Text = write(_Cut(MAX_DRAFTS), machine(), _good, 100)
    assert write(fixed, machine(), _good, 100) == ours


def test_costs_that_rounds_without_drafts_show_change_the_plan():
    """Beside good lookups a plan made before plain steps were timed holds on, whatever these show."""
    costs, batch = ListedCosts([1.0] * (MAX_DRAFTS + 1)), Batch((MAX_DRAFTS,), 1, rooms=(MAX_DRAFTS,))
    schedule = AdaptiveScheduler(costs=costs).start(new_call(max_drafts=MAX_DRAFTS))
    assert schedule.num_drafts(batch) > 0
    for _ in range(PLAN_EVERY):
        sure = Offer((7,) * MAX_DRAFTS, (1.0,) * MAX_DRAFTS)
        assert schedule.choose(batch, [sure]).num_looked_up == (MAX_DRAFTS,)
        looked_up = [MAX_DRAFTS]
        schedule.observe(RoundOutcome(batch, 0, looked_up, looked_up, 0.0, 1.0, num_looked_up=looked_up))
    costs.verify[1:] = [9.0] * MAX_DRAFTS
    assert schedule.num_drafts(batch) == 0
