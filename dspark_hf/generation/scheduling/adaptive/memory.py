"""What a process remembers about a drafter from one call of `generate` to the next.

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

from dspark_hf.generation.drafting.chances import MatchChances
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.locking import locked
from dspark_hf.generation.scheduling.adaptive.branching import RecentTrees
from dspark_hf.generation.scheduling.adaptive.parking import Parking
from dspark_hf.generation.scheduling.defaults import (
    FEW_BLOCKS,
    FEWEST_ROUNDS,
    NUM_RECENT_BLOCKS,
    PRIOR_BLOCKS,
    PRIOR_CHANCE,
)
from dspark_hf.generation.scheduling.estimator import AcceptanceEstimator
from dspark_hf.generation.scheduling.interface import CallInfo


class RecentMargins:
    """The margins of the latest drafted rounds, as samples of the rounds to come.

    The estimator turns them into chances each time they are asked for, so what it learns later also counts for them.
    """

    def __init__(self) -> None:
        self._blocks: deque[NDArray[np.float64]] = deque()
        # counts every block ever added, so that a plan can tell its age
        self.num_blocks = 0

    @locked
    def add(self, margins: Sequence[Sequence[float]]) -> None:
        """Add the margins `(b, K)` of a round's rows, those that had room for all drafts."""
        self._blocks.append(np.array(margins, dtype=np.float64))
        self.num_blocks += 1
        while (
            len(self._blocks) > FEWEST_ROUNDS
            and sum(map(len, self._blocks)) - len(self._blocks[0]) >= NUM_RECENT_BLOCKS
        ):
            self._blocks.popleft()

    @locked
    def forget_old(self) -> None:
        """Keep the latest few blocks."""
        while len(self._blocks) > FEW_BLOCKS:
            self._blocks.popleft()

    @locked
    def gains(
        self, num_drafts: int, estimator: AcceptanceEstimator, shown: Sequence[float] | None = None
    ) -> NDArray[np.float64]:
        """Return the gains `(N, num_drafts)`; levels that were not drafted continue the decay of those before.

        While there are few, what the drafter has `shown` before, by level, counts beside them.
        """
        by_shape: dict[tuple[int, ...], list[NDArray[np.float64]]] = {}
        for margins in self._blocks:
            by_shape.setdefault(margins.shape, []).append(margins)
        # plans look at all blocks together, in whatever order
        found: list[list[float]] = []
        for alike in by_shape.values():
            found += estimator.chance(np.stack(alike)).cumprod(2).mean(1).tolist()
        if shown is not None:
            found += [list(shown)] * max(PRIOR_BLOCKS - len(found), 0)
        found = found or [[]]
        return np.array([_filled_up(gains, num_drafts) for gains in found])


@dataclass
class DrafterState:
    """What is known about a drafter: the fit of its acceptance, its recent blocks, and whether it is parked."""

    estimator: AcceptanceEstimator = field(default_factory=AcceptanceEstimator)
    recent_margins: RecentMargins = field(default_factory=RecentMargins)
    recent_trees: RecentTrees = field(default_factory=RecentTrees)
    # gains that the drafter had where it was evaluated, if it was
    shown: list[float] | None = None
    _parking: dict[int, Parking] = field(default_factory=dict)

    @locked
    def parking(self, num_rows: int) -> Parking:
        """Return the state for batches of about that many rows: drafting may lose with sixteen and pay with one."""
        return self._parking.setdefault(num_rows.bit_length(), Parking())


# by target, then by whether tokens are sampled
_Memories = WeakKeyDictionary[PreTrainedModel, dict[bool, DrafterState]]

_MEMORIES: WeakKeyDictionary[Drafter, _Memories] = WeakKeyDictionary()
# what is looked up does not depend on the drafter
_MATCHES: WeakKeyDictionary[PreTrainedModel, dict[bool, MatchChances]] = WeakKeyDictionary()


def forget_drafters() -> None:
    """Forget everything about all drafters, and about what was looked up."""
    _MEMORIES.clear()
    _MATCHES.clear()


@locked
def remembered_matches(call: CallInfo) -> MatchChances:
    """Return how sure looked-up drafts are for the call's target, greedy or sampling."""
    by_use = _MATCHES.setdefault(call.target.model, {})
    return by_use.setdefault(call.is_sampling, MatchChances())


@locked
def remembered(call: CallInfo) -> DrafterState:
    """Return the state of the call's drafter with its target, greedy or sampling; schedules update it in place."""
    by_target: _Memories = _MEMORIES.setdefault(call.drafter, WeakKeyDictionary())
    by_use = by_target.setdefault(call.target.model, {})
    return by_use.setdefault(call.is_sampling, DrafterState(shown=_shown(call.drafter)))


def _shown(drafter: Drafter) -> list[float] | None:
    rates = drafter.accept_rates
    return None if rates is None else np.cumprod(rates).tolist()


def _filled_up(gains: list[float], num_drafts: int) -> list[float]:
    filled = gains[:num_drafts]
    decay = filled[-1] ** (1 / len(filled)) if filled else PRIOR_CHANCE
    while len(filled) < num_drafts:
        filled.append((filled[-1] if filled else 1.0) * decay)
    return filled
