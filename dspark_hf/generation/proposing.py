"""Who drafts in a round, and how much of it is verified: what the loop asks of a schedule, and in which order.

b rows in the batch, K drafts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.drafting.lookup import Lookups, with_lookups
from dspark_hf.generation.scheduling.interface import Batch, Choice, RoundOutcome, Schedule
from dspark_hf.generation.statistics import RoundInProgress


def propose(
    schedule: Schedule,
    lookups: Lookups | None,
    batch: Batch,
    draft: Callable[[int], DraftedBlock | None],
    record: RoundInProgress,
    device: torch.device,
) -> DraftedBlock | None:
    """Return the drafts of all rows, made or looked up, if any; record them and how many are to be verified.

    Args:
        schedule: decides.
        lookups: the rows' texts, if drafts may be looked up in them.
        batch: the rows.
        draft: runs the drafter for so many drafts; returns None for none.
        record: what has become of the round so far.
        device: where looked-up drafts are put if the drafter made none.
    """
    offers = [] if lookups is None else lookups.offers(batch.rooms)
    choice = schedule.choose(batch, offers) if offers else Choice(schedule.num_drafts(batch))
    drafted = draft(choice.num_drafts)
    if any(choice.num_looked_up):
        record.num_looked_up = choice.num_looked_up
        drafted = with_lookups(drafted, offers, choice.num_looked_up, device)
    if drafted is not None and drafted.parents is not None:
        record.num_drafted, record.num_verified = drafted.num_drafts, [schedule.admit_tree(drafted, batch)]
    elif drafted is not None:
        record.num_drafted, record.confidence = drafted.num_modelled_drafts, drafted.confidence
        record.num_verified = schedule.admit(drafted, choice.limit(batch))
    return drafted


def outcome_of(
    batch: Batch,
    record: RoundInProgress,
    draft_seconds: float,
    other_seconds: float,
    *,
    is_typical: bool,
) -> RoundOutcome:
    """Return what a schedule learns of a round that is over."""
    return RoundOutcome(
        Choice(record.num_drafted, record.num_looked_up).limit(batch),
        record.num_drafted,
        record.num_verified,
        record.num_accepted,
        draft_seconds,
        other_seconds,
        is_typical,
        record.num_looked_up,
        record.places,
    )
