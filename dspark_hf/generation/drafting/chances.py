"""How sure a looked-up draft is, learned from how often matches of its length have gone on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

# Lengths of matches from which on they count together, and the chance that one goes on before anything is known: where
# nothing disputes it, in what was written and in the prompt, and where something does. Plain choice: what SmolLM2's
# own greedy answers to 300 questions and tasks show, behind long matches with a prompt a little more, for texts that
# are copied; a few observations outweigh it.
_STARTS = (1, 2, 3, 4, 5, 7, 10, 16, 24, 40)
_WRITTEN_PRIOR = (0.55, 0.7, 0.73, 0.73, 0.75, 0.8, 0.83, 0.9, 0.94, 0.99)
_PROMPT_PRIOR = (0.3, 0.57, 0.62, 0.68, 0.71, 0.76, 0.78, 0.83, 0.9, 0.97)
_DISPUTED_PRIOR = (0.15, 0.3, 0.3, 0.3, 0.3, 0.3, 0.4, 0.5, 0.5, 0.5)
_PRIOR = _WRITTEN_PRIOR + _PROMPT_PRIOR + _DISPUTED_PRIOR
# Observations that weigh as much as the prior. Plain choice.
_TRUST = 4.0
# What an observation still weighs after another one. Plain choice: some hundred count, so that they follow the text.
_MEMORY = 0.99


class MatchChances:
    """The chance that a match goes on by one more token, by its length, where it stood, and whether that is disputed.

    A text repeats itself for longer than it repeats a prompt, of which it often takes up a phrase. A match is disputed
    if the text went on otherwise at the place before the latest: then it is less sure than a shorter one that is not.
    What is looked up and not verified teaches as much: the text shows whether it went on. So no estimate stays wrong
    for want of trials.

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

    def of_drafts(
        self, match_length: int, count: int, *, is_disputed: bool = False, is_in_prompt: bool = False
    ) -> tuple[float, ...]:
        """Return the chance of each of `count` drafts behind a match.

        One that is accepted makes the match longer, and settles what was disputed.
        """
        groups = (_group(match_length + slot, is_disputed and not slot, is_in_prompt) for slot in range(count))
        return tuple(self._went_on[group] / self._seen[group] for group in groups)

    def learn(
        self, match_length: int, went_on: Sequence[bool], *, is_disputed: bool = False, is_in_prompt: bool = False
    ) -> None:
        """Learn from the tokens behind a match: whether each is the one that was expected, up to the first other."""
        for slot, is_expected in enumerate(went_on):
            group = _group(match_length + slot, is_disputed and not slot, is_in_prompt)
            self._went_on[group] = self._went_on[group] * _MEMORY + is_expected
            self._seen[group] = self._seen[group] * _MEMORY + 1
            if not is_expected:
                return


def _group(match_length: int, is_disputed: bool, is_in_prompt: bool) -> int:
    kind = 2 if is_disputed else int(is_in_prompt)
    return bisect_right(_STARTS, match_length) - 1 + len(_STARTS) * kind
