"""Accepted length and acceptance by position, as the paper counts them (arXiv 2607.05147, Section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_hf.evaluation.intervals import Estimate, ratio_of_sums
from dspark_hf.evaluation.records import RoundRecord


@dataclass(frozen=True)
class Acceptance:
    """How far the target follows a drafter.

    Attributes:
        num_rounds: verify passes.
        num_committed: tokens they committed, the bonus tokens included.
        num_verified: drafts the target checked.
        num_accepted: drafts it accepted, before stop rules.
        tau: committed tokens per round, the bonus token included; None without rounds.
        verify_rate: share of the verified drafts that were accepted; None if nothing was verified.
        rate_by_position: share of the drafts at each position that were accepted, given that the prefix was.
        verified_by_position: number of rounds behind each of these.
    """

    num_rounds: int
    num_committed: int
    num_verified: int
    num_accepted: int
    tau: Estimate | None
    verify_rate: Estimate | None
    rate_by_position: tuple[Estimate, ...]
    verified_by_position: tuple[int, ...]


def summarize_acceptance(prompts: Sequence[Sequence[RoundRecord]]) -> Acceptance:
    """Return the acceptance over all rounds, given the rounds of every prompt.

    Example:

        >>> rounds = [RoundRecord(num_drafted=3, num_verified=3, num_accepted=1, num_committed=2)]
        >>> summarize_acceptance([rounds]).tau.value
        2.0
    """
    num_rounds = [len(rounds) for rounds in prompts]
    committed = [sum(one.num_committed for one in rounds) for rounds in prompts]
    verified = [sum(one.num_verified for one in rounds) for rounds in prompts]
    accepted = [sum(one.num_accepted for one in rounds) for rounds in prompts]
    rates, counts = _by_position(prompts)
    return Acceptance(
        num_rounds=sum(num_rounds),
        num_committed=sum(committed),
        num_verified=sum(verified),
        num_accepted=sum(accepted),
        tau=ratio_of_sums(committed, num_rounds),
        verify_rate=ratio_of_sums(accepted, verified),
        rate_by_position=rates,
        verified_by_position=counts,
    )


def _by_position(prompts: Sequence[Sequence[RoundRecord]]) -> tuple[tuple[Estimate, ...], tuple[int, ...]]:
    rates, counts = [], []
    width = max((one.num_verified for rounds in prompts for one in rounds), default=0)
    for position in range(width):
        # a draft counts where it was verified behind an accepted prefix
        reached = [
            [one for one in rounds if position < one.num_verified and position <= one.num_accepted]
            for rounds in prompts
        ]
        accepted = [sum(position < one.num_accepted for one in rounds) for rounds in reached]
        rate = ratio_of_sums(accepted, [len(rounds) for rounds in reached])
        if rate is None:
            break
        rates.append(rate)
        counts.append(sum(len(rounds) for rounds in reached))
    return tuple(rates), tuple(counts)
