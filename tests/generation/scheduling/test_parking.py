"""When a parked drafter is tried again."""

from __future__ import annotations

from dspark_hf.generation.scheduling.parking import Parking


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
    """One lucky trial turns drafting on, or a good drafter waits as long as a bad one."""
    parking = Parking()
    _trials(parking, 500)
    while not parking.is_trial_due():
        parking.count_plain()
    parking.count_trial(has_paid=True)
    assert parking.is_trial_due()
    parking.count_trial(has_paid=False)
    assert not parking.is_trial_due()


def test_drafting_starts_the_gaps_anew():
    """A drafter that has paid for long waits for its next trial as long as one that never did."""
    fresh, parking = Parking(), Parking()
    _trials(parking, 1000)
    parking.count_drafted()
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
            parking.count_drafted()
    assert 0 < len(plain) < 0.03 * 1000
    # no plain step is due in a parked run
    assert not parking.is_plain_step_due()
