"""What the decoding loop asks of a scheduler.

b rows in the batch, K drafts.

Rows may look drafts up in prompt and text instead of asking the drafter. `Schedule.choose` says which rows do, and how
many drafts each: of earlier rounds, and of what rows could look up, it may use everything.

A user chooses a `Scheduler`, which holds settings. `Scheduler.start` returns the `Schedule` of one call of `generate`.
The loop asks it twice per round: how many drafts to make, and, once they are made, how many to verify. The first
answer may use earlier rounds only. The second may also use this round's confidences, as long as no draft helps to
decide whether it is verified itself: `docs/scheduling.md` explains why that keeps the output exact.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from dspark_hf.generation.drafting.chances import MatchChances
from dspark_hf.generation.drafting.interface import DraftedBlock, Drafter
from dspark_hf.generation.drafting.lookup import Offer
from dspark_hf.generation.scheduling.defaults import LEAST_SURVIVAL
from dspark_hf.generation.targets.adapter import TargetAdapter


@dataclass(frozen=True)
class CallInfo:
    """What is known when a call of `generate` starts.

    Args:
        target: the target.
        drafter: the drafter.
        num_rows: rows of the batch.
        max_drafts: most drafts per round: the block size, or fewer if the user asked for fewer.
        prompt_length: tokens of the longest prompt.
        is_sampling: whether tokens are sampled.
        may_branch: whether `Schedule.num_branching` is asked: there is one row, and drafter, target and the row's
            rules have to do with trees.
    """

    target: TargetAdapter
    drafter: Drafter
    num_rows: int
    max_drafts: int
    prompt_length: int = 0
    is_sampling: bool = False
    may_branch: bool = False


@dataclass(frozen=True)
class Batch:
    """The rows that take part in a round, before it starts.

    Args:
        limits: most drafts that each row may verify, `b` numbers; 0 for a row that waits for others. Until rows have
            chosen between drafter and lookup, these are the drafter's drafts.
        num_live: rows that are still being written; the others only cost time.
        context_length: tokens of the longest row.
        rooms: most drafts that each row may verify if it looks them up, `b` numbers; empty where none does.
    """

    limits: tuple[int, ...]
    num_live: int
    context_length: int = 0
    rooms: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.limits)

    @property
    def max_drafts(self) -> int:
        """Most drafts that any row may verify."""
        return max(self.limits)

    def cut(self, num_drafts: int) -> list[int]:
        """Return `num_drafts` for every row, or its limit where that is lower."""
        return [min(num_drafts, limit) for limit in self.limits]


@dataclass(frozen=True)
class Choice:
    """Who drafts in a round, and how much.

    Args:
        num_drafts: drafts that the drafter makes for each row that looks nothing up; 0 if it is not asked.
        num_looked_up: how many each row looks up, `b` numbers; empty if none does.
    """

    num_drafts: int
    num_looked_up: tuple[int, ...] = ()

    def limit(self, batch: Batch) -> Batch:
        """Return the batch in which every row may verify no more than it has drafts."""
        if not self.num_looked_up:
            return batch
        pairs = zip(self.num_looked_up, batch.limits, strict=True)
        return replace(batch, limits=tuple(count or min(limit, self.num_drafts) for count, limit in pairs))


class Mean:
    """A mean that follows what is added.

    Args:
        start: its value before anything is known.
    """

    def __init__(self, start: float):
        self.value = start
        self._weight = 1.0

    def add(self, value: float) -> None:
        """Add a value; some fifty count."""
        self._weight = 1 + 0.98 * self._weight
        self.value += (value - self.value) / self._weight


@dataclass(frozen=True)
class RoundOutcome:
    """A finished round.

    Args:
        batch: its rows.
        num_drafted: the drafter's drafts per row, 0 in a parked round.
        num_verified: verified drafts of every row.
        num_accepted: accepted drafts of every row.
        draft_seconds: time in the drafter.
        other_seconds: the rest of the round: the target's pass, sampling, bookkeeping.
        is_typical: False if the drafter did extra work: it read the prompts, or the hidden states that rounds without
            drafts left unread.
        num_looked_up: drafts that each row looked up instead, empty if none did.
        places: where drafts branched, the indices of those that were accepted; None for chains.
    """

    batch: Batch
    num_drafted: int
    num_verified: Sequence[int]
    num_accepted: Sequence[int]
    draft_seconds: float = 0.0
    other_seconds: float = 0.0
    is_typical: bool = True
    num_looked_up: Sequence[int] = ()
    places: tuple[int, ...] | None = None

    @property
    def modelled_rows(self) -> list[int]:
        """The rows whose drafts, if any, are the drafter's."""
        return [i for i in range(self.batch.num_rows) if not self.num_looked_up or not self.num_looked_up[i]]

    @property
    def width(self) -> int:
        """Tokens per row of the target's pass: the anchor and the longest row's drafts."""
        return 1 + max(self.num_verified)


def _num_likely(offer: Offer) -> int:
    return sum(chance >= LEAST_SURVIVAL for chance in offer.survival())


class Schedule(ABC):
    """The decisions of one call of `generate`.

    `wants_margins` says whether drafted blocks must carry their margins. `parked_because` says why drafting is
    given up for now, where a schedule expects that it would not pay; it is None while drafts are made.
    """

    wants_margins: bool = False
    parked_because: str | None = None

    @cached_property
    def match_chances(self) -> MatchChances:
        """How sure drafts are that are looked up."""
        return MatchChances()

    @cached_property
    def accepted(self) -> Mean:
        """How many of the drafter's drafts a row accepts in a round."""
        return Mean(start=2.0)

    def num_drafts(self, batch: Batch) -> int:
        """Return how many drafts to make, decided from earlier rounds only."""
        return batch.max_drafts

    def num_branching(self, batch: Batch) -> int:
        """Return how many drafts of a tree the drafter makes instead of a chain, asked after `num_drafts`; 0 for none.

        Only asked where the call `may_branch`.
        """
        return 0

    def admit_tree(self, drafted: DraftedBlock, batch: Batch) -> int:
        """Return how many drafts of a tree to verify, the most probable paths first; all by default.

        Nothing was drawn for a tree, so any of its drafts may decide.
        """
        return drafted.num_drafts

    def observe_tree(self, outcome: RoundOutcome) -> None:
        """Learn from a finished round whose drafts branched; does nothing by default."""
        return

    def choose(self, batch: Batch, offers: Sequence[Offer]) -> Choice:
        """Return who drafts, where some rows could look drafts up; decided from earlier rounds and these offers only.

        By default, in rounds that are to have drafts, each row looks up what it is offered if it expects more of it
        than it got from the drafter so far: up to the first draft that is hardly reached and accepted, and no more
        than the drafter could draft, if there is one.
        """
        num_drafts, most = self.num_drafts(batch), batch.max_drafts
        if most and not num_drafts:
            return Choice(0)
        bar = self.accepted.value if most else 0.0
        most = most or max(batch.rooms)
        looked_up = tuple(min(_num_likely(offer), most) if offer.expected(most) > bar else 0 for offer in offers)
        if not any(looked_up):
            return Choice(num_drafts)
        # rows without room wait: nothing is drafted for them alone
        needs_drafter = any(limit and not count for limit, count in zip(batch.limits, looked_up, strict=True))
        return Choice(num_drafts if needs_drafter else 0, looked_up)

    def compare(self, outcome: RoundOutcome) -> None:
        """Learn from a finished round what the drafter is worth beside lookups."""
        for row in outcome.modelled_rows:
            if outcome.num_verified[row]:
                self.accepted.add(outcome.num_accepted[row])

    @abstractmethod
    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        """Return how many drafts of every row to verify, at most its limit."""

    def observe(self, outcome: RoundOutcome) -> None:
        """Learn from a finished round; does nothing by default."""
        return


class Scheduler(ABC):
    """Choose how many drafts are made and how many are verified.

    Subclass it to write a scheduler of your own. `name` is what error messages call it, the class's name by default.
    `learns_costs` says whether it learns what passes take from the rounds of calls: such a call may begin with slower
    ones, and none is sure to repeat another.

    Example:

        >>> from dspark_hf.generation.scheduling import Batch, Schedule, Scheduler
        >>> class HalfScheduler(Scheduler):
        ...     def start(self, call):
        ...         return HalfSchedule()
        >>> class HalfSchedule(Schedule):
        ...     def admit(self, drafted, batch):
        ...         return batch.cut(batch.max_drafts // 2)
        >>> HalfScheduler.name
        'HalfScheduler'
        >>> schedule = HalfScheduler().start(call=None)
        >>> batch = Batch(limits=(6, 2), num_live=2)
        >>> schedule.num_drafts(batch), schedule.admit(None, batch)
        (6, [3, 2])

        An object of it goes wherever a name does: `target.generate(..., scheduler=HalfScheduler())`.
    """

    name: ClassVar[str]
    learns_costs: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def start(self, call: CallInfo) -> Schedule:
        """Return the schedule of one call of `generate`."""


def __getattr__(name: str) -> Any:
    renamed = {"Call": CallInfo, "Outcome": RoundOutcome}
    if name not in renamed:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: Any = renamed[name]
    warnings.warn(f"`{name}` is called `{found.__name__}` now. Use that name.", DeprecationWarning, stacklevel=2)
    return found
