"""Lossless verification of a drafted block: all of it at once when sampling (Sun et al., arXiv 2403.10444).

B batch, K drafts, V vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_hf.generation.drawing import draw


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
    `bonus` `(B)`; the committed tokens follow the target exactly, and no lossless rule that sees one block accepts
    more of them on average.

    With w_0 = 1 and w_k = min(w_{k-1} p_t(x_k) / p_d(x_k), 1), the chance that at least k drafts are accepted is
    w_k for every prefix x_1 to x_k. A draft that the target likes better than the drafter so makes up for an earlier
    one that it likes less; token by token (Leviathan et al., Algorithm 1) it cannot. Whether there is a draft k + 1 to
    verify may depend on the first k drafts, as under that rule.
    """
    weights = prefix_weights(draft_ids, draft_probs, target_probs, is_certain)
    stops = stop_chances(weights, draft_ids, draft_probs, target_probs, num_verified, is_certain)
    places = torch.arange(stops.shape[1], device=stops.device)
    num_accepted = torch.where(torch.rand_like(stops) < stops, places, 0).amax(1)
    rows = torch.arange(len(draft_ids), device=draft_ids.device)
    at_end = target_probs[rows, num_accepted]
    # after a rejection sample from max(w p_t - p_d, 0); after a fully accepted block from p_t itself
    last = num_accepted.clamp_max(draft_ids.shape[1] - 1)
    rejected = _probs_at(last, draft_ids, draft_probs, is_certain, at_end.shape[-1])
    left = (weights[rows, num_accepted, None] * at_end - rejected).clamp_min(0)
    residual = torch.where((num_accepted < num_verified)[:, None], left, at_end)
    # equal distributions reject with probability zero, yet rounding may: then p_t is the residual's limit
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, at_end)
    return num_accepted, draw(residual)


def prefix_weights(
    draft_ids: Tensor, draft_probs: Tensor | None, target_probs: Tensor, is_certain: Tensor | None = None
) -> Tensor:
    """Return w `(B, K + 1)`, the chance of every prefix of the drafts to be accepted."""
    num_drafts = draft_ids.shape[1]
    p_draft = _chances_of_draft(draft_ids, draft_probs, is_certain)
    p_target = target_probs[:, :num_drafts].gather(-1, draft_ids[..., None]).squeeze(-1)
    weights = [torch.ones_like(p_target[:, 0])]
    for k in range(num_drafts):
        # a token that was drawn has a chance above zero
        weights.append((weights[-1] * p_target[:, k] / p_draft[:, k]).clamp_max(1.0))
    return torch.stack(weights, dim=1)


def stop_chances(
    weights: Tensor,
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    num_verified: Tensor,
    is_certain: Tensor | None = None,
) -> Tensor:
    """Return the chance `(B, K + 1)` that k drafts are accepted, given that no more than k are.

    Behind all verified drafts it is w_k; before, what is left of w_k by the prefixes that are one draft longer,
    r_k / (r_k + 1 - w_k) with r_k the sum of max(w_k p_t - p_d, 0).
    """
    num_drafts = draft_ids.shape[1]
    num_drawn = 0 if draft_probs is None else draft_probs.shape[1]
    chances = []
    for k in range(num_drafts):
        weight, p_target = weights[:, k], target_probs[:, k]
        # of a draft that was certain: all but the draft itself, which can hold no more than it has
        left = weight * (1 - p_target.gather(-1, draft_ids[:, k : k + 1]).squeeze(-1)).clamp_min(0)
        if draft_probs is not None and k < num_drawn:
            drawn = (weight[:, None] * p_target - draft_probs[:, k]).clamp_min(0).sum(-1)
            left = drawn if is_certain is None else torch.where(is_certain[:, k], left, drawn)
        # nothing is left, and nothing is missing, where w = 1 and p_t = p_d
        chances.append(left / (left + 1 - weight).clamp_min(torch.finfo(left.dtype).tiny))
    places = torch.arange(num_drafts + 1, device=weights.device)
    before_end = torch.stack([*chances, weights[:, num_drafts]], dim=1)
    before_end = torch.where(places < num_verified[:, None], before_end, 0.0)
    return torch.where(places == num_verified[:, None], weights, before_end)


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
