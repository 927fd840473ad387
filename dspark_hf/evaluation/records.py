"""What one answer leaves behind: its tokens, its time, and what came of every round."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dspark_hf.generation.statistics import SpeculationStatistics


@dataclass(frozen=True)
class RoundRecord:
    """One row's verify pass.

    Attributes:
        num_drafted: tokens the drafter proposed.
        num_verified: drafts the target checked.
        num_accepted: drafts it accepted, before a stop rule cut them.
        num_committed: tokens that became output, the bonus token included, after a stop rule cut them.
        confidence: the estimated chance of each draft, given its prefix; None without a confidence head.
    """

    num_drafted: int
    num_verified: int
    num_accepted: int
    num_committed: int
    confidence: tuple[float, ...] | None = None

    @property
    def has_finite_confidence(self) -> bool:
        """Whether the confidence, if there is one, consists of numbers."""
        return all(math.isfinite(one) for one in self.confidence or ())


@dataclass(frozen=True)
class Answer:
    """One call of `generate`: every row's new tokens up to its end, the time in seconds, and the rounds.

    `rounds` is None for plain decoding and for more rows than one, where rows that wait for others blur the counts.
    """

    token_ids: tuple[tuple[int, ...], ...]
    seconds: float
    rounds: tuple[RoundRecord, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Number of new tokens of all rows."""
        return sum(len(row) for row in self.token_ids)


def round_records(statistics: SpeculationStatistics) -> tuple[RoundRecord, ...]:
    """Return the rounds of a call of `generate` with one row.

    Raises:
        ValueError: for more rows.
    """
    if len(statistics.origins) != 1:
        raise ValueError(
            f"`statistics` must be of a call with one row, got {len(statistics.origins)} rows. Measure acceptance "
            "with batch size 1; the batch does not change it."
        )
    records = []
    num_left = statistics.num_committed
    for one in statistics.rounds:
        verified, accepted = one.num_verified[0], one.num_accepted[0]
        confidence = None if one.confidence is None else tuple(one.confidence[0].tolist())
        # only the last round of a row can lose tokens to a stop rule
        committed = min(accepted + 1, num_left)
        num_left -= committed
        records.append(RoundRecord(one.num_drafted, verified, accepted, committed, confidence))
    return tuple(records)
