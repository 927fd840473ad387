"""Acceptance one position at a time, where a position's scores may be asked for only once its prefix is to stay.

b rows in the batch, K drafts, W = 1 + K positions of a verify pass, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.drawing import draw_or_best, most_likely
from dspark_hf.generation.rows import Rows
from dspark_hf.generation.targets.interface import TargetPass
from dspark_hf.generation.verification import verify, verify_greedy


def accept_in_steps(
    rows: Rows, target_pass: TargetPass, drafts: Tensor, drafted: DraftedBlock | None, num_verified: Sequence[int]
) -> tuple[Tensor, list[int], Tensor]:
    """Accept drafts as `verification.py` does, each judged by scores that are made when all before it are accepted.

    Takes a pass over the `drafts` `(b, K)`, how many of them are up for acceptance per row, and the block they come
    from. Where rows advance together, the first that rejects a draft ends the round for all: the others keep the draft
    that they accepted at this position as their last token.

    Returns the scores `(b, W, V)`, zero where none were asked for, how many drafts each row accepts, and the token
    `(b,)` that each gets behind them.
    """
    num_drafts = drafts.shape[1]
    limits = torch.tensor(list(num_verified), device=drafts.device)
    num_accepted, bonus = [0] * len(drafts), drafts.new_zeros(len(drafts))
    going, steps = rows.live(), []
    for position in range(num_drafts + 1):
        scores = rows.scores_at(target_pass, drafts[:, :position], going)
        steps.append(scores)
        accepted, tokens = _judge(rows, scores, drafts, drafted, position, limits)
        staying = rows.going_on(going, accepted, tokens)
        for row in going:
            if row not in staying:
                # an end that was accepted has nothing behind it
                is_end = accepted[row] and rows.is_end(row, int(tokens[row]))
                num_accepted[row], bonus[row] = position + is_end, tokens[row]
        going = staying
        if not going:
            break
    steps += [torch.zeros_like(steps[0])] * (num_drafts + 1 - len(steps))
    return _stacked(steps), num_accepted, bonus


def _judge(
    rows: Rows, scores: Tensor, drafts: Tensor, drafted: DraftedBlock | None, position: int, limits: Tensor
) -> tuple[list[bool], Tensor]:
    """Return whether each row accepts its draft at `position`, and the token `(b,)` that it gets there."""
    scores = rows.with_noise(scores[:, None], position)[:, 0]
    probs = rows.probabilities(scores)
    if position == drafts.shape[1]:
        tokens = draw_or_best(scores, probs)
        return [False] * len(scores), tokens
    draft_ids = drafts[:, position : position + 1].to(scores.device)
    is_verified = (limits > position).long().to(scores.device)
    if probs is None or drafted is None:
        num_accepted, tokens = verify_greedy(draft_ids, most_likely(scores)[:, None].expand(-1, 2), is_verified)
    else:
        draft_probs, is_certain = (_at(values, position, scores) for values in (drafted.probs, drafted.is_certain))
        # what stands behind the draft is not known yet, nor used
        both = probs[:, None].expand(-1, 2, -1)
        num_accepted, tokens = verify(draft_ids, draft_probs, both, is_verified, is_certain)
    accepted = num_accepted.bool()
    return accepted.tolist(), torch.where(accepted, draft_ids[:, 0], tokens)


def _at(values: Tensor | None, position: int, scores: Tensor) -> Tensor | None:
    """Return one position of `(b, K, ...)`, or None where nothing is said of it."""
    if values is None or values.shape[1] <= position:
        return None
    return values[:, position : position + 1].to(scores.device)


def _stacked(steps: list[Tensor]) -> Tensor:
    # a user's processor may answer in another dtype
    dtype = steps[0].dtype
    for scores in steps:
        dtype = torch.promote_types(dtype, scores.dtype)
    return torch.stack([scores.to(dtype) for scores in steps], dim=1)
