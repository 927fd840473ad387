"""Oracle of the training objective (Eq. 8-12): one slot at a time, the whole vocabulary, autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class OracleSlot:
    """One slot: its place `k` in the block, the true token and what the target believes, `(V,)` logits."""

    k: int
    is_valid: bool
    true_id: int
    target_logits: Tensor


@dataclass
class OracleLosses:
    """The objective (differentiable) and its terms per slot."""

    total: Tensor
    cross_entropy: list[float]
    distance: list[float]
    accept_rate: list[float]


def objective(
    draft_logits: list[Tensor],
    confidence_logits: list[Tensor] | None,
    slots: list[OracleSlot],
    draft_token_ids: list[int],
    *,
    ce: float,
    tv: float,
    confidence: float,
    decay: float,
) -> OracleLosses:
    """Return the objective over slots whose drafter proposes `draft_token_ids` with `draft_logits`, one a slot.

    A true token that cannot be proposed has no cross-entropy; the target's mass on such tokens counts in full as
    distance.
    """
    cross_entropies, distances, accept_rates, terms = [], [], [], []
    weight_sum = 0.0
    for index, slot in enumerate(slots):
        target_probs = slot.target_logits.softmax(0)
        proposed = draft_logits[index].softmax(0)
        draft_probs = torch.zeros_like(target_probs)
        for position, token in enumerate(draft_token_ids):
            draft_probs = draft_probs + proposed[position] * torch.nn.functional.one_hot(
                torch.tensor(token), len(target_probs)
            )
        cross_entropy = torch.zeros((), dtype=target_probs.dtype)
        if slot.true_id in draft_token_ids:
            cross_entropy = -proposed[draft_token_ids.index(slot.true_id)].log()
        # Eq. 10 takes the whole L1 norm, Eq. 8 half of it
        distance = (draft_probs - target_probs).abs().sum()
        accept_rate = 1 - 0.5 * distance.item()
        term = ce * cross_entropy + tv * distance
        if confidence_logits is not None:
            belief = confidence_logits[index].sigmoid()
            # the label is a constant: the backbone must not learn to be easy to judge
            term = term - confidence * (accept_rate * belief.log() + (1 - accept_rate) * (1 - belief).log())
        weight = math.exp(-slot.k / decay) if slot.is_valid else 0.0
        weight_sum += weight
        terms.append(weight * term)
        cross_entropies.append(cross_entropy.item())
        distances.append(distance.item())
        accept_rates.append(accept_rate)
    return OracleLosses(sum(terms) / weight_sum, cross_entropies, distances, accept_rates)
