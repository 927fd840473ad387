"""Lossless verification of a drafted block (Leviathan et al., Algorithm 1).

B batch, K drafts, V vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor


def verify(
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    num_verified: Tensor,
    is_certain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept the longest lossless prefix of each row's drafts and sample the bonus token.

    Takes `draft_ids` `(B, K)`, `draft_probs` `(B, K, V)`, `target_probs` `(B, K + 1, V)` (fp32, rows sum to 1) and
    `num_verified` `(B)`: only the first so many drafts of a row are up for acceptance. Drafts that `is_certain`
    `(B, K)` marks were not drawn: their distribution knows them alone. So it is for all without `draft_probs`, which
    may have fewer slots than there are drafts, those up to the last that was drawn. Returns `num_accepted` `(B)` and
    `bonus` `(B)`; the committed tokens follow the target exactly.
    """
    num_drafts = draft_ids.shape[1]
    p_draft = _chances_of_draft(draft_ids, draft_probs, is_certain)
    p_target = target_probs[:, :num_drafts].gather(-1, draft_ids[..., None]).squeeze(-1)
    accepted = torch.rand_like(p_draft) * p_draft < p_target
    num_accepted = _count_prefix(accepted, num_verified)
    rows = torch.arange(len(draft_ids), device=draft_ids.device)
    at_end = target_probs[rows, num_accepted]
    # after a rejection sample from max(p_t - p_d, 0); after a fully accepted block from p_t itself
    rejected = _probs_at(num_accepted.clamp_max(num_drafts - 1), draft_ids, draft_probs, is_certain, at_end.shape[-1])
    residual = torch.where((num_accepted < num_verified)[:, None], (at_end - rejected).clamp_min(0), at_end)
    # equal distributions reject with probability zero, yet rounding may: then p_t is the residual's limit
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, at_end)
    return num_accepted, torch.multinomial(residual, num_samples=1).squeeze(-1)


def verify_greedy(draft_ids: Tensor, target_ids: Tensor, num_verified: Tensor) -> tuple[Tensor, Tensor]:
    """Accept each row's drafts while they equal the target's choices `target_ids` `(B, K + 1)`.

    Returns `num_accepted` `(B)` and `bonus` `(B)`, the target's choice after them.
    """
    num_accepted = _count_prefix(draft_ids == target_ids[:, : draft_ids.shape[1]], num_verified)
    return num_accepted, target_ids.gather(-1, num_accepted[:, None]).squeeze(-1)


def _chances_of_draft(draft_ids: Tensor, draft_probs: Tensor | None, is_certain: Tensor | None) -> Tensor:
    """Return with what chance each draft was drawn, `(B, K)`."""
    if draft_probs is None:
        return torch.ones(draft_ids.shape, device=draft_ids.device)
    num_drawn = draft_probs.shape[1]
    chances = draft_probs.gather(-1, draft_ids[:, :num_drawn, None]).squeeze(-1)
    if is_certain is None:
        return chances
    chances = torch.nn.functional.pad(chances, (0, draft_ids.shape[1] - num_drawn), value=1.0)
    return chances.masked_fill(is_certain, 1.0)


def _probs_at(
    slots: Tensor, draft_ids: Tensor, draft_probs: Tensor | None, is_certain: Tensor | None, vocab_size: int
) -> Tensor:
    """Return the distributions `(B, V)` of the drafts at `slots` `(B)`."""
    rows = torch.arange(len(draft_ids), device=draft_ids.device)
    if draft_probs is not None and is_certain is None:
        return draft_probs[rows, slots]
    drafts = draft_ids[rows, slots][:, None]
    alone = torch.zeros(len(draft_ids), vocab_size, device=draft_ids.device).scatter_(1, drafts, 1.0)
    if draft_probs is None or is_certain is None:
        return alone
    drawn = draft_probs[rows, slots.clamp_max(draft_probs.shape[1] - 1)]
    return torch.where(is_certain[rows, slots, None], alone, drawn)


def _count_prefix(accepted: Tensor, num_verified: Tensor) -> Tensor:
    slots = torch.arange(accepted.shape[1], device=accepted.device)
    return (accepted & (slots < num_verified[:, None])).long().cumprod(-1).sum(-1)
