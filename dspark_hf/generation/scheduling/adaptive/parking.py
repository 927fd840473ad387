"""When to give up drafting, when to try it again, and when to compare it with plain steps."""

from __future__ import annotations

from dspark_hf.generation.locking import locked
from dspark_hf.generation.scheduling.defaults import (
    FIRST_TRIAL_GAP,
    LEAST_LOSS,
    LONGEST_TRIAL_GAP,
    MOST_LOSS,
    PLAIN_GAPS,
    TIMES_TO_BELIEVE,
)


class Parking:
    """Count rounds to decide when the other mode, plain or drafting, should be seen again.

    The gap between trials doubles after each failure, so that trials cost below 2% of a long run. It goes back to its
    first length once drafting pays. `is_parked` is true after drafting was given up because it lost time.
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
        """Return whether this round should try a parked drafter."""
        return self._num_plain >= self._gap

    def is_plain_step_due(self) -> bool:
        """Return whether this round should be a plain step, to compare drafting with."""
        return self._num_drafted >= PLAIN_GAPS[self._num_comparisons]

    @locked
    def count_plain(self) -> None:
        """Count a round without drafts."""
        self._num_plain += 1
        if self._num_plain >= TIMES_TO_BELIEVE:
            if self.is_plain_step_due():
                self._num_comparisons = min(self._num_comparisons + 1, len(PLAIN_GAPS) - 1)
            self._num_drafted = 0

    @locked
    def count_drafted(self, num_rows: int, gain: float) -> None:
        """Count a round whose drafts were expected to pay.

        Args:
            num_rows: rows that took part.
            gain: tokens per row beyond what plain steps would have written in the same time.
        """
        self._num_plain = 0
        self._gap = FIRST_TRIAL_GAP
        self._num_drafted += 1
        self._balance.add(num_rows, gain)
        if self._balance.is_losing():
            self.is_parked = True
            self._num_paid = 0
            self._balance = Balance()

    @locked
    def count_trial(self, *, has_paid: bool) -> None:
        """Count a trial; after one that paid, the next one is due at once."""
        self._num_drafted = 0
        self._num_plain = self._gap if has_paid else 0
        self._num_paid = self._num_paid + 1 if has_paid else 0
        self.is_parked = self.is_parked and self._num_paid < TIMES_TO_BELIEVE
        if not has_paid:
            self._gap = min(2 * self._gap, LONGEST_TRIAL_GAP)


class Balance:
    """What recent drafting rounds have really lost, whatever was expected (Page's cumulative sum).

    Losses add up and gains reduce them, down to zero but no further: a drafter that was good for one text can still be
    given up in the next. A drafter that gains on the whole hardly ever reaches the limit.
    """

    def __init__(self) -> None:
        self._loss = 0.0
        self._limit = MOST_LOSS

    def add(self, num_rows: int, gain: float) -> None:
        """Add a round in which every row gained `gain` tokens on average."""
        self._loss = max(self._loss - gain, 0.0)
        self._limit = max(MOST_LOSS / num_rows, LEAST_LOSS)

    def is_losing(self) -> bool:
        """Return whether the loss is more than bad luck explains for that many rows."""
        return self._loss > self._limit
