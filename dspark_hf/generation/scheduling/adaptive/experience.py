"""The recent blocks of a drafter, as samples of the blocks to come.

N blocks, b rows, K drafts; a gain is the expected number of accepted drafts of a level, here per row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark_hf.generation.scheduling.estimator import AcceptanceEstimator
from dspark_hf.generation.scheduling.locking import in_turns

# rows' blocks that count: enough to average over easy and hard places, few enough to follow the text
_NUM_ROWS = 48
_FEWEST_BLOCKS = 4
# how many of them still count once drafting was given up, so that a few trials can change the verdict
_NUM_PARKED_BLOCKS = 8
# chance of a draft where nothing is known yet
_PRIOR_CHANCE = 0.7


class Experience:
    """Keep the margins of the last drafted rounds.

    What they are worth is asked of the estimator anew each time: once it knows better, so does the past.
    """

    def __init__(self) -> None:
        self._blocks: deque[NDArray[np.float64]] = deque()
        # changes with every block, so that a plan knows when it is old
        self.num_blocks = 0

    @in_turns
    def add(self, margins: Sequence[Sequence[float]]) -> None:
        """Add the margins `(b, K)` of a round, of rows that could use all drafts."""
        self._blocks.append(np.array(margins, dtype=np.float64))
        self.num_blocks += 1
        while len(self._blocks) > _FEWEST_BLOCKS and sum(map(len, self._blocks)) - len(self._blocks[0]) >= _NUM_ROWS:
            self._blocks.popleft()

    @in_turns
    def forget_old(self) -> None:
        """Keep the latest few blocks."""
        while len(self._blocks) > _NUM_PARKED_BLOCKS:
            self._blocks.popleft()

    @in_turns
    def gains(self, num_drafts: int, estimator: AcceptanceEstimator) -> NDArray[np.float64]:
        """Return the gains `(N, num_drafts)`; levels that were not drafted decay as those before them."""
        found = [estimator.chance(margins).cumprod(1).mean(0).tolist() for margins in self._blocks] or [[]]
        return np.array([_filled_up(gains, num_drafts) for gains in found])


def _filled_up(gains: list[float], num_drafts: int) -> list[float]:
    filled = gains[:num_drafts]
    decay = filled[-1] ** (1 / len(filled)) if filled else _PRIOR_CHANCE
    while len(filled) < num_drafts:
        filled.append((filled[-1] if filled else 1.0) * decay)
    return filled
