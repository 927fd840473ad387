"""The paper's asynchronous variant: a capacity from earlier rounds, spent on the current round's best drafts.

b rows, K drafts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling.confidence import ConfidenceSource
from dspark_hf.generation.scheduling.costs.online import Costs, round_seconds
from dspark_hf.generation.scheduling.hardware_aware import ProfiledSchedule, ProfiledScheduler
from dspark_hf.generation.scheduling.interface import Batch, Schedule
from dspark_hf.generation.scheduling.survival import best_level, possible_survival

# how many rounds old the confidences are that fix the capacity (paper, Section 3.3)
DELAY = 2


class AsynchronousScheduler(ProfiledScheduler):
    """Fix how much to verify from the confidences of two rounds ago, then admit the best drafts of this round.

    The capacity comes from a search over all widths: it looks past steps of the cost that Algorithm 1 would stop at.
    Within it, drafts are admitted in the order of their survival.

    Args:
        costs: what passes cost; default: this machine's profile of the target, made on first use.
        confidence: `"head"` for the drafter's own confidence, `"online"` for the estimator that learns from the
            margin between the two best draft logits; default: the head if the drafter has one, else online.
    """

    name = "asynchronous"

    def _schedule(self, costs: Costs, source: ConfidenceSource) -> Schedule:
        return _Asynchronous(costs, source)


@dataclass(frozen=True)
class Capacity:
    """What a round may verify: `drafts_per_row` on average, none deeper than `depth` levels."""

    drafts_per_row: float
    depth: int


class _Asynchronous(ProfiledSchedule):
    def __init__(self, costs: Costs, source: ConfidenceSource):
        super().__init__(costs, source)
        self._capacities: deque[Capacity] = deque(maxlen=DELAY)

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        survival = possible_survival(self._source.read(drafted), batch)
        num_drafts = survival.shape[1]
        # the first rounds know no capacity yet and verify everything
        is_known = len(self._capacities) == DELAY
        capacity = self._capacities[0] if is_known else Capacity(num_drafts, num_drafts)
        self._capacities.append(self._find_capacity(survival, batch, drafted.num_modelled_drafts))
        return batch.cut(pass_depth(survival, capacity))

    def _find_capacity(self, survival: Tensor, batch: Batch, num_modelled: int) -> Capacity:
        gains: list[float] = survival.sum(0).tolist()
        depth = best_level(gains, batch.num_live, round_seconds(self._costs, batch, num_modelled))
        return Capacity(_drafts_above(survival, depth) / batch.num_rows, depth)


def pass_depth(survival: Tensor, capacity: Capacity) -> int:
    """Return how many levels a pass goes over: down to the deepest of the best drafts that `capacity` admits.

    Best is the greatest survival, of equals the shallower draft, of those the upper row. This is the order of a
    search that learns a draft's survival only once the drafts before it are admitted, so no draft decides about
    itself or an earlier one. What else the padded pass holds down to that depth costs nothing and is verified too.
    """
    num_rows, num_drafts = survival.shape
    depth = min(capacity.depth, num_drafts)
    count = min(round(capacity.drafts_per_row * num_rows), num_rows * depth)
    if not count:
        return 0
    return 1 + int(_levels_best_first(survival[:, :depth])[:count].max())


def _drafts_above(survival: Tensor, depth: int) -> int:
    """Return how many of the best drafts come before the first one deeper than `depth` levels."""
    deeper = (_levels_best_first(survival) >= depth).nonzero()
    return int(deeper[0]) if len(deeper) else survival.numel()


def _levels_best_first(survival: Tensor) -> Tensor:
    """Return the levels `(b * K)` of all drafts, the first being 0, best draft first."""
    # laid out level by level and there row by row, so that a stable sort leaves equals in that order
    order = survival.T.reshape(-1).argsort(descending=True, stable=True)
    return order // len(survival)
