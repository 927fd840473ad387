"""When a parked drafter is tried again, and a busy one compared with plain decoding."""

from __future__ import annotations

# parked rounds before the first trial, and most between two: a trial loses about one plain step
_FIRST_GAP = 16
_LONGEST_GAP = 256
# drafting rounds between two plain ones, which keep the price of a plain step up to date
_PLAIN_EVERY = 64


class Parking:
    """Count the rounds since the other mode was seen.

    The gap between trials doubles with each one that fails, so that trials cost below 2% of a long run, and starts
    anew once drafting pays.
    """

    def __init__(self) -> None:
        self._gap = _FIRST_GAP
        self._num_parked = 0
        self._num_drafted = 0

    def is_trial_due(self) -> bool:
        """Return whether a parked drafter should be tried in this round."""
        return self._num_parked >= self._gap

    def is_plain_step_due(self) -> bool:
        """Return whether a drafting run should make one plain step."""
        return self._num_drafted >= _PLAIN_EVERY

    def count_plain(self) -> None:
        """Count a round without drafts."""
        self._num_parked += 1
        self._num_drafted = 0

    def count_drafted(self) -> None:
        """Count a round of drafts that were expected to pay."""
        self._num_parked = 0
        self._gap = _FIRST_GAP
        self._num_drafted += 1

    def count_trial(self, *, has_paid: bool) -> None:
        """Count a trial; after one that paid, which may have been luck, the next follows at once."""
        self._num_drafted = 0
        self._num_parked = self._gap if has_paid else 0
        if not has_paid:
            self._gap = min(2 * self._gap, _LONGEST_GAP)
