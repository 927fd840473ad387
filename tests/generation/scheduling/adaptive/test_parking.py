"""When a parked drafter is tried again."""

from __future__ import annotations

import random

import pytest

from dspark_hf.generation.scheduling.adaptive.parking import Parking


def _trials(parking: Parking, num_rounds: int) -> list[int]:
    """Let every trial fail; return the rounds they took place in."""
    trials = []
    for number in range(num_rounds):
        if parking.is_trial_due():
            trials.append(number)
            parking.count_trial(has_paid=False)
        else:
            parking.count_plain()
    return trials


def test_gaps_between_failing_trials_double():
    """A drafter that never pays is tried as often as one that might, or never again."""
    trials = _trials(Parking(), 3000)
    waits = [trials[0]] + [later - earlier - 1 for earlier, later in zip(trials, trials[1:], strict=False)]
    assert all(after == min(2 * before, waits[-1]) for before, after in zip(waits, waits[1:], strict=False))
    assert waits[0] < waits[-2] == waits[-1]


def test_trials_of_a_long_failing_run_are_rare():
    """Looking whether drafting pays costs a text for which it never does more than two percent of its rounds."""
    trials = _trials(Parking(), 2000)
    assert 0 < len(trials) < 0.02 * 2000


def test_a_trial_that_paid_is_repeated_at_once():
    """A good drafter waits for its next trial as long as a bad one."""
    parking = Parking()
    _trials(parking, 500)
    while not parking.is_trial_due():
        parking.count_plain()
    parking.count_trial(has_paid=True)
    assert parking.is_trial_due()
    parking.count_trial(has_paid=False)
    assert not parking.is_trial_due()


def _lose(parking: Parking, gains: list[float], num_rows: int = 1) -> int | None:
    """Return after how many drafted rounds of such gains drafting is given up, or None."""
    for number, gain in enumerate(gains, start=1):
        parking.count_drafted(num_rows, gain)
        if parking.is_parked:
            return number
    return None


def test_drafting_that_loses_is_given_up():
    """Drafting goes on for as long as it is expected to pay, whatever it does."""
    parking = Parking()
    assert not parking.is_parked
    rounds = _lose(parking, [-0.4, -0.6] * 50)
    assert rounds is not None
    assert rounds < 40
    # many rows tell sooner
    sooner = _lose(Parking(), [-0.4, -0.6] * 50, num_rows=8)
    assert sooner is not None
    assert sooner < rounds


@pytest.mark.parametrize("good_rounds", [0, 500])
def test_good_rounds_do_not_count_for_ever(good_rounds):
    """A drafter that was good for one text is trusted in the next."""
    parking = Parking()
    assert _lose(parking, [1.0] * good_rounds) is None
    assert _lose(parking, [-0.5] * 100) is not None


def test_bad_luck_is_no_loss():
    """Drafting that pays on the whole is given up after a few bad rounds."""
    draw = random.Random(0)
    num_lost = 0
    for _ in range(50):
        # 0.4 on average: most blocks lose half a token, some win three
        gains = [3.0 if draw.random() < 0.26 else -0.5 for _ in range(100)]
        num_lost += _lose(Parking(), gains) is not None
    assert num_lost < 10


def test_one_lucky_trial_does_not_end_parking():
    """Drafting that lost is taken up again after a single trial that paid."""
    parking = Parking()
    _lose(parking, [-1.0] * 100)
    parking.count_trial(has_paid=True)
    assert parking.is_parked
    parking.count_trial(has_paid=False)
    parking.count_trial(has_paid=True)
    assert parking.is_parked
    for _ in range(5):
        parking.count_trial(has_paid=True)
    assert not parking.is_parked


def test_drafting_starts_the_gaps_anew():
    """A drafter that has paid for long waits for its next trial as long as one that never did."""
    fresh, parking = Parking(), Parking()
    _trials(parking, 1000)
    parking.count_drafted(1, 1.0)
    assert _trials(parking, 100)[0] == _trials(fresh, 100)[0]


def test_a_drafting_run_makes_plain_steps():
    """What a plain step costs is never measured again while drafting pays."""
    parking = Parking()
    plain = []
    for number in range(1000):
        if parking.is_plain_step_due():
            plain.append(number)
            parking.count_plain()
        else:
            parking.count_drafted(1, 1.0)
    assert 0 < len(plain) < 0.04 * 1000
    # no plain step is due in a parked run
    assert not parking.is_plain_step_due()


def test_a_few_rows_have_bad_luck_too():
    """Drafting that gains a quarter of a token per round with four rows is given up most of the time."""
    draw = random.Random(1)
    num_lost = 0
    for _ in range(200):
        # a round costs half a plain step more than one, and a row in four wins three tokens
        gains = [sum(3.0 * (draw.random() < 0.25) for _ in range(4)) / 4 - 0.5 for _ in range(100)]
        num_lost += _lose(Parking(), gains, num_rows=4) is not None
    assert num_lost < 50
