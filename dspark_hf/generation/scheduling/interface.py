"""What the decoding loop asks of a scheduler.

b rows in the batch, K drafts.

A `Scheduler` is what a user chooses; it holds settings. `Scheduler.start` gives a `Schedule` for one call of
`generate`, which the loop asks twice a round: how many drafts to make, and, once they are there, how many to verify.
The first answer may use earlier rounds only. The second may also use the round's confidences, in an order in which no
draft decides about itself: `docs/scheduling.md` says why that keeps the output exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dspark_hf.generation.drafting.interface import DraftedBlock, Drafter
from dspark_hf.generation.targets.adapter import TargetAdapter


@dataclass(frozen=True)
class Call:
    """What is known when `generate` starts.

    Args:
        target: the target.
        drafter: the drafter.
        num_rows: rows of the batch.
        max_drafts: drafts per round at most: the block size, or fewer if the user said so.
        prompt_length: tokens of the longest prompt.
        is_sampling: whether tokens are sampled.
    """

    target: TargetAdapter
    drafter: Drafter
    num_rows: int
    max_drafts: int
    prompt_length: int = 0
    is_sampling: bool = False


@dataclass(frozen=True)
class Batch:
    """The rows that take part in a round, before it starts.

    Args:
        limits: drafts that each row may verify at most, `b` of them; 0 for a row that waits for others.
        num_live: rows that still write; the others only cost.
        context_length: tokens of the longest row.
    """

    limits: tuple[int, ...]
    num_live: int
    context_length: int = 0

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.limits)

    @property
    def max_drafts(self) -> int:
        """Drafts of the row that has most room."""
        return max(self.limits)

    def cut(self, num_drafts: int) -> list[int]:
        """Return `num_drafts` for every row, or what it has room for."""
        return [min(num_drafts, limit) for limit in self.limits]


@dataclass(frozen=True)
class Outcome:
    """A round that is over.

    Args:
        batch: its rows.
        num_drafted: drafts per row, 0 in a parked round.
        num_verified: verified drafts of every row.
        num_accepted: accepted drafts of every row.
        draft_seconds: time in the drafter.
        other_seconds: the rest of the round: the target's pass, sampling, bookkeeping.
        is_typical: False if the drafter did work that it does not do in every round: it read the prompts, or what
            parked rounds left.
    """

    batch: Batch
    num_drafted: int
    num_verified: Sequence[int]
    num_accepted: Sequence[int]
    draft_seconds: float = 0.0
    other_seconds: float = 0.0
    is_typical: bool = True

    @property
    def width(self) -> int:
        """Tokens per row of the target's pass: the anchor and the longest row's drafts."""
        return 1 + max(self.num_verified)


class Schedule(ABC):
    """The decisions of one call of `generate`.

    `wants_margins` says whether drafted blocks must come with their margins.
    """

    wants_margins: bool = False

    def num_drafts(self, batch: Batch) -> int:
        """Return how many drafts to make, 0 for none, from earlier rounds only."""
        return batch.max_drafts

    @abstractmethod
    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        """Return how many drafts of every row to verify, at most its limit."""

    def observe(self, outcome: Outcome) -> None:
        """Learn from a round that is over; nothing to learn by default."""
        return


class Scheduler(ABC):
    """A way to choose how many drafts are made and verified.

    `name` is what errors call it: that of the class unless it has another.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def start(self, call: Call) -> Schedule:
        """Return the schedule of one call of `generate`."""
