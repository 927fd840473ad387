"""When drafting is given up, when it is tried again, and when a busy drafter is compared with plain steps."""

from __future__ import annotations

from dspark_hf.generation.scheduling.defaults import (
    FIRST_TRIAL_GAP,
    LEAST_LOSS,
    LONGEST_TRIAL_GAP,
    MOST_LOSS,
    PLAIN_GAPS,
    TIMES_TO_BELIEVE,
)
from dspark_hf.generation.scheduling.locking import in_turns


class Parking:
    """Count the rounds since the other mode was seen.

    The gap between trials doubles with each one that fails, so that trials cost below 2% of a long run, and starts
    anew once drafting pays. `is_parked` says that drafting was given up because it lost time.
    """

    def __init__(self) -> None:
        self.is_parked = False
        self._balance = Balance()
        self._gap = FIRST_TRIAL_GAP
        self._num_comparisons = 0
        self._num_plain = 0
        self._num_drafted = 0
        self._num_paid = 0

    def is_trial_due(self) -> bool:
        """Return whether a parked drafter should be tried in this round."""
        return self._num_plain >= self._gap

    def is_plain_step_due(self) -> bool:
        """Return whether a drafting run should make a plain step."""
        return self._num_drafted >= PLAIN_GAPS[self._num_comparisons]

    @in_turns
    def count_plain(self) -> None:
        """Count a round without drafts."""
        self._num_plain += 1
        if self._num_plain >= TIMES_TO_BELIEVE:
            if self.is_plain_step_due():
                self._num_comparisons = min(self._num_comparisons + 1, len(PLAIN_GAPS) - 1)
            self._num_drafted = 0

    @in_turns
    def count_drafted(self, num_rows: int, gain: float) -> None:
        """Count a round of drafts that were expected to pay.

        Args:
            num_rows: rows that took part.
            gain: tokens per row beyond those that plain steps would have written meanwhile.
        """
        self._num_plain = 0
        self._gap = FIRST_TRIAL_GAP
        self._num_drafted += 1
        self._balance.add(num_rows, gain)
        if self._balance.is_losing():
            self.is_parked = True
            self._num_paid = 0
            self._balance = Balance()

    @in_turns
    def count_trial(self, *, has_paid: bool) -> None:
        """Count a trial; after one that paid the next follows at once."""
        self._num_drafted = 0
        self._num_plain = self._gap if has_paid else 0
        self._num_paid = self._num_paid + 1 if has_paid else 0
        self.is_parked = self.is_parked and self._num_paid < TIMES_TO_BELIEVE
        if not has_paid:
            self._gap = min(2 * self._gap, LONGEST_TRIAL_GAP)


class Balance:
    """What the latest drafting rounds have really lost, whatever was expected of them (Page's cumulative sum).

    Losses add up, and gains make up for them, but are not saved: a drafter that was good for one text may be given up
    in the next. One that gains on the whole hardly ever comes so low.
    """

    def __init__(self) -> None:
        self._loss = 0.0
        self._limit = MOST_LOSS

    def add(self, num_rows: int, gain: float) -> None:
        """Add a round in which every row gained `gain` tokens on average."""
        self._loss = max(self._loss - gain, 0.0)
        self._limit = max(MOST_LOSS / num_rows, LEAST_LOSS)

    def is_losing(self) -> bool:
        """Return whether more plain steps were lost than so many rows lose by bad luck."""
        return self._loss > self._limit
