"""What a process remembers of a drafter from one call of `generate` to the next.

N blocks, b rows, K drafts; a gain is the expected number of accepted drafts of a level, here per row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.scheduling.adaptive.parking import Parking
from dspark_hf.generation.scheduling.defaults import FEW_BLOCKS, FEWEST_ROUNDS, NUM_RECENT_BLOCKS, PRIOR_CHANCE
from dspark_hf.generation.scheduling.estimator import AcceptanceEstimator
from dspark_hf.generation.scheduling.interface import Call
from dspark_hf.generation.scheduling.locking import in_turns


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
        while (
            len(self._blocks) > FEWEST_ROUNDS
            and sum(map(len, self._blocks)) - len(self._blocks[0]) >= NUM_RECENT_BLOCKS
        ):
            self._blocks.popleft()

    @in_turns
    def forget_old(self) -> None:
        """Keep the latest few blocks."""
        while len(self._blocks) > FEW_BLOCKS:
            self._blocks.popleft()

    @in_turns
    def gains(self, num_drafts: int, estimator: AcceptanceEstimator) -> NDArray[np.float64]:
        """Return the gains `(N, num_drafts)`; levels that were not drafted decay as those before them."""
        found = [estimator.chance(margins).cumprod(1).mean(0).tolist() for margins in self._blocks] or [[]]
        return np.array([_filled_up(gains, num_drafts) for gains in found])


@dataclass
class DrafterMemory:
    """How a drafter fares: the fit of its acceptance, its recent blocks, and when it was last tried."""

    estimator: AcceptanceEstimator = field(default_factory=AcceptanceEstimator)
    experience: Experience = field(default_factory=Experience)
    _parking: dict[int, Parking] = field(default_factory=dict)

    @in_turns
    def parking(self, num_rows: int) -> Parking:
        """Return what is known of batches of about so many rows: what loses with sixteen may pay with one."""
        return self._parking.setdefault(num_rows.bit_length(), Parking())


# by target, and there by whether tokens are sampled
_Memories = WeakKeyDictionary[PreTrainedModel, dict[bool, DrafterMemory]]

_MEMORIES: WeakKeyDictionary[Drafter, _Memories] = WeakKeyDictionary()


def forget_drafters() -> None:
    """Begin anew with all drafters, as a new process does."""
    _MEMORIES.clear()


@in_turns
def remembered(call: Call) -> DrafterMemory:
    """Return what is known of the call's drafter with its target, greedy or sampling; it is updated in place."""
    by_target: _Memories = _MEMORIES.setdefault(call.drafter, WeakKeyDictionary())
    by_use = by_target.setdefault(call.target.model, {})
    return by_use.setdefault(call.is_sampling, DrafterMemory())


def _filled_up(gains: list[float], num_drafts: int) -> list[float]:
    filled = gains[:num_drafts]
    decay = filled[-1] ** (1 / len(filled)) if filled else PRIOR_CHANCE
    while len(filled) < num_drafts:
        filled.append((filled[-1] if filled else 1.0) * decay)
    return filled
