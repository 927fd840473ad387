"""Who drafts in a round: the drafter, the rows' own texts, both or neither, by what each is expected to be worth.

b rows in the batch, K drafts of the drafter; level j is draft j of every row, its gain the number of them expected to
be accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_hf.generation.drafting.lookup import Offer
from dspark_hf.generation.scheduling.defaults import FIRST_LOOKUP_GAP, LONGEST_TRIAL_GAP, RATE_TRUST
from dspark_hf.generation.scheduling.interface import Choice

# Levels that a pass over lookups goes to, besides the longest. Plain choice: costs of few widths are soon known.
_LEVELS = (1, 2, 3, 5, 7, 11, 15)


@dataclass(frozen=True)
class DrafterPlan:
    """What the drafter would do in a round: `gains`, per row, of its K drafts, and the `seconds` that they take."""

    gains: Sequence[float]
    seconds: float


def choose_sources(
    offers: Sequence[Offer],
    plan: DrafterPlan | None,
    are_live: Sequence[bool],
    passes: Sequence[float],
    rate: float,
) -> Choice | None:
    """Return the choice that is worth most, None if that looks nothing up.

    A choice is worth the tokens it is expected to yield, less those that its time would yield at the rate of decoding
    so far. Offers follow from what was written before, so a search over all of them is no look at this round's drafts.

    Args:
        offers: the rows' offers.
        plan: what the drafter would do, None if it is not to be asked.
        are_live: whether each row is still being written.
        passes: seconds of a pass that verifies 0 drafts, 1 draft and so on, as many as any row is offered, and K.
        rate: tokens per second.
    """
    survivals = [offer.survival() for offer in offers]
    worth, level = _best(survivals, passes, rate)
    if plan is None:
        return _choice(0, survivals, level)
    drafted_worth, _ = _best([plan.gains] * sum(are_live), passes, rate)
    # a row asks whoever it expects more of
    own = [survival if sum(survival) > sum(plan.gains) else [] for survival in survivals]
    others = [plan.gains for live, survival in zip(are_live, own, strict=True) if live and not survival]
    shared_worth, shared_level = _best([*own, *others], passes, rate)
    if level and worth >= max(shared_worth if others else 0.0, drafted_worth) - rate * plan.seconds:
        return _choice(0, survivals, level)
    if not others or drafted_worth > shared_worth:
        return None
    return _choice(len(plan.gains) if others else 0, own, shared_level)


def _choice(num_drafts: int, survivals: Sequence[Sequence[float]], level: int) -> Choice | None:
    counts = tuple(min(len(survival), level) for survival in survivals)
    return Choice(num_drafts, counts) if any(counts) else None


def _best(survivals: Sequence[Sequence[float]], passes: Sequence[float], rate: float) -> tuple[float, int]:
    """Return what the best number of levels is worth beyond a plain step, and that number."""
    worth, best, tokens = 0.0, 0, 0.0
    longest = max(map(len, survivals))
    for level in range(1, longest + 1):
        tokens += sum(survival[level - 1] for survival in survivals if len(survival) >= level)
        if level not in _LEVELS and level != longest:
            continue
        gained = tokens - rate * (passes[level] - passes[0])
        if gained > worth:
            worth, best = gained, level
    return worth, best


class Rate:
    """Tokens per second of the latest rounds, of which about a hundred count."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """Add a round."""
        self._tokens, self._seconds = 0.99 * self._tokens + tokens, 0.99 * self._seconds + seconds

    def value(self, usual: float, plain_seconds: float) -> float:
        """Return the tokens per second, among a few rounds of the `usual` rate: one lucky round must not decide."""
        if not self._seconds:
            # not that and a rounding error
            return usual
        trusted = RATE_TRUST * plain_seconds
        return (self._tokens + usual * trusted) / (self._seconds + trusted)


class Trials:
    """Count good offers that were passed over, or cut short, to decide when one is taken all the same.

    It is, less and less often.
    """

    def __init__(self) -> None:
        self._gap = FIRST_LOOKUP_GAP
        self._num_passed_over = 0

    def is_due(self, expected: float) -> bool:
        """Return whether to take an offer that is not worth its time, with so many more accepted drafts expected."""
        if expected < 1:
            return False
        self._num_passed_over += 1
        if self._num_passed_over < self._gap:
            return False
        self._num_passed_over, self._gap = 0, min(2 * self._gap, LONGEST_TRIAL_GAP)
        return True
