"""What drafts that branch would give one row, learned from the trees that the drafter grew lately.

N trees, K drafts of each, the most probable path first; the gain of a draft is the chance that it is accepted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from dspark_hf.generation.locking import locked
from dspark_hf.generation.scheduling.defaults import (
    CHANCE_BANDS,
    CHANCE_MEMORY,
    CHANCE_TRUST,
    FEW_TREES,
    NUM_RECENT_BLOCKS,
    OTHER_KIND_EVERY,
)


class PathChances:
    """The chance that a path is the text's, by how probable the drafter says it is.

    Drafters are too sure of some paths, or not sure enough: paths are counted in bands, and each band is put right by
    what became of those in it.

    Example:

        >>> chances = PathChances()
        >>> chances.learn([0.6, 0.2], accepted=())
        >>> few, same = chances.of([0.6, 0.01])
        >>> few < 0.6, same
        (True, 0.01)
    """

    def __init__(self) -> None:
        self._right = [CHANCE_TRUST] * (len(CHANCE_BANDS) + 1)
        self._expected = list(self._right)

    def of(self, probabilities: Sequence[float]) -> list[float]:
        """Return the chances of paths that the drafter gives these `probabilities`."""
        bands = [bisect_right(CHANCE_BANDS, value) for value in probabilities]
        return [
            min(value * self._right[band] / self._expected[band], 1.0)
            for band, value in zip(bands, probabilities, strict=True)
        ]

    def learn(self, probabilities: Sequence[float], accepted: Collection[int]) -> None:
        """Learn from the drafts that were verified, and the indices of those among them that were accepted."""
        for index, value in enumerate(probabilities):
            band = bisect_right(CHANCE_BANDS, value)
            self._right[band] = self._right[band] * CHANCE_MEMORY + (index in accepted)
            self._expected[band] = self._expected[band] * CHANCE_MEMORY + value


class RecentTrees:
    """The latest trees that were grown, as samples of those to come, and when it is a tree's turn to be tried."""

    def __init__(self) -> None:
        self._trees: deque[list[float]] = deque(maxlen=NUM_RECENT_BLOCKS)
        self._chances = PathChances()
        # counts every tree ever added, so that a plan can tell its age
        self.num_trees = 0
        self._num_rounds = 0

    @locked
    def is_turn(self, num_tried: int) -> bool:
        """Return whether this round is to show what the kind of drafts would give that is not in use.

        A few rounds do until it was tried some times, `num_tried` so far, later every so many one.
        """
        self._num_rounds += 1
        return num_tried < FEW_TREES or self._num_rounds % OTHER_KIND_EVERY == 0

    @locked
    def chances(self, probabilities: Sequence[float]) -> list[float]:
        """Return the gains of the drafts of a tree."""
        return self._chances.of(probabilities)

    @locked
    def learn(self, probabilities: Sequence[float], num_verified: int, accepted: Collection[int]) -> None:
        """Learn from a tree whose first `num_verified` drafts were verified: those at `accepted` were right."""
        self._trees.append(list(probabilities))
        self.num_trees += 1
        self._chances.learn(probabilities[:num_verified], accepted)

    @locked
    def gains(self) -> NDArray[np.float64]:
        """Return the gains `(N, K)` of the latest trees; K is that of the largest, and others have no more."""
        # a drafter may have nothing to say
        most = max(1, *map(len, self._trees))
        return np.array([self._chances.of(tree) + [0.0] * (most - len(tree)) for tree in self._trees])
