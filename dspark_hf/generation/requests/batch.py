"""A running batch that requests join and leave."""

from __future__ import annotations

from dspark_hf.generation.decoding import Rounds
from dspark_hf.generation.drafting.interface import DraftContext
from dspark_hf.generation.drafting.lookup import Lookups
from dspark_hf.generation.requests.rows import RequestRow, RequestRows
from dspark_hf.generation.scheduling.interface import Schedule
from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.interface import TargetState


class RequestBatch:
    """Rows of requests, and the rounds that decode them.

    Args:
        adapter: the target, entered by the caller.
        target: the rows' run of the target.
        context: the drafter's context for them.
        schedule: how many drafts are made and verified.
        rows: the requests.
        statistics: where passes and rounds are counted, over all requests.
        lookups: the rows' texts, if drafts may be looked up in them.
    """

    def __init__(
        self,
        adapter: TargetAdapter,
        target: TargetState,
        context: DraftContext,
        schedule: Schedule,
        rows: list[RequestRow],
        statistics: SpeculationStatistics,
        lookups: Lookups | None = None,
    ):
        self._rows = RequestRows(rows, statistics)
        self._rounds = Rounds(adapter, target, context, schedule, self._rows, statistics, lookups)

    @property
    def rows(self) -> list[RequestRow]:
        """The requests inside."""
        return self._rows.rows

    def prefill(self) -> None:
        """Process the prompts and write every request's first token."""
        self._rounds.prefill()

    def round(self) -> None:
        """Decode all requests by one round."""
        self._rounds.round()

    def append(self, other: RequestBatch) -> None:
        """Take over the requests of another batch, which ends there."""
        # first, so that whatever fails below is known to concern them too
        self._rows.append(other._rows)
        self._rounds.append(other._rounds)

    def drop_cancelled(self) -> None:
        """Let requests go that were cancelled since the last round."""
        self._rounds.drop_rows()

    def take_left(self) -> list[RequestRow]:
        """Return the requests that have left since the last call."""
        return self._rows.take_left()
