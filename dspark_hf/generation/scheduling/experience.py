"""The recent blocks of a drafter: what they were believed to be worth.

N blocks, K drafts; a gain is the expected number of accepted drafts of a level, here per row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# blocks that count: enough to average over easy and hard places, few enough to follow the text
NUM_BLOCKS = 32
# how many of them still count once drafting was given up, so that a few trials can change the verdict
_NUM_PARKED_BLOCKS = 8
# chance of a draft where nothing is known yet
_PRIOR_CHANCE = 0.7


class Experience:
    """Keep the gains of the last drafted rounds, as samples of the rounds to come."""

    def __init__(self) -> None:
        self._gains: deque[tuple[float, ...]] = deque(maxlen=NUM_BLOCKS)
        # changes with every block, so that a plan knows when it is old
        self.num_blocks = 0

    def add(self, gains: Sequence[float]) -> None:
        """Add a drafted round."""
        self._gains.append(tuple(gains))
        self.num_blocks += 1

    def forget_old(self) -> None:
        """Keep the latest few blocks."""
        while len(self._gains) > _NUM_PARKED_BLOCKS:
            self._gains.popleft()

    def gains(self, num_drafts: int) -> NDArray[np.float64]:
        """Return the gains `(N, num_drafts)`; levels that were not drafted decay as those before them."""
        blocks = self._gains or [()]
        return np.array([_filled_up(gains, num_drafts) for gains in blocks])


def _filled_up(gains: Sequence[float], num_drafts: int) -> list[float]:
    filled = list(gains[:num_drafts])
    decay = filled[-1] ** (1 / len(filled)) if filled else _PRIOR_CHANCE
    while len(filled) < num_drafts:
        filled.append((filled[-1] if filled else 1.0) * decay)
    return filled
