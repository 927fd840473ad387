"""How sure a looked-up draft is, learned from how often matches of its length have gone on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

# Lengths of matches from which on they count together, and the chance that one goes on before anything is known: first
# of those that nothing disputes, then of disputed ones. Plain choice: about what SmolLM2's own greedy answers show; a
# few observations outweigh it.
_STARTS = (1, 2, 3, 4, 5, 7, 10, 16)
_SURE_PRIOR = (0.33, 0.6, 0.7, 0.75, 0.8, 0.87, 0.92, 0.95)
_DISPUTED_PRIOR = (0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.4, 0.5)
_PRIOR = _SURE_PRIOR + _DISPUTED_PRIOR
# Observations that weigh as much as the prior. Plain choice.
_TRUST = 4.0
# What an observation still weighs after another one. Plain choice: some hundred count, so that they follow the text.
_MEMORY = 0.99


class MatchChances:
    """The chance that a match goes on by one more token, by its length, and by whether its places dispute it.

    A match is disputed if the text went on otherwise at the place before the latest: then it is less sure than a
    shorter one that is not. What is looked up and not verified teaches as much: the text shows whether it went on. So
    no estimate stays wrong for want of trials.

    Example:

        >>> chances = MatchChances()
        >>> before, = chances.of_drafts(2, 1)
        >>> chances.learn(2, [True, True, False])
        >>> after, = chances.of_drafts(2, 1)
        >>> before < after
        True
    """

    def __init__(self) -> None:
        self._went_on = [_TRUST * chance for chance in _PRIOR]
        self._seen = [_TRUST] * len(_PRIOR)

    def of_drafts(self, match_length: int, count: int, *, is_disputed: bool = False) -> tuple[float, ...]:
        """Return the chance of each of `count` drafts behind a match.

        One that is accepted makes the match longer, and settles what was disputed.
        """
        groups = (_group(match_length + slot, is_disputed and not slot) for slot in range(count))
        return tuple(self._went_on[group] / self._seen[group] for group in groups)

    def learn(self, match_length: int, went_on: Sequence[bool], *, is_disputed: bool = False) -> None:
        """Learn from the tokens behind a match: whether each is the one that was expected, up to the first other."""
        for slot, is_expected in enumerate(went_on):
            group = _group(match_length + slot, is_disputed and not slot)
            self._went_on[group] = self._went_on[group] * _MEMORY + is_expected
            self._seen[group] = self._seen[group] * _MEMORY + 1
            if not is_expected:
                return


def _group(match_length: int, is_disputed: bool) -> int:
    return bisect_right(_STARTS, match_length) - 1 + len(_STARTS) * is_disputed
