"""The sequential part of drafting: a chain of tokens, each drawn in the knowledge of those before it (Eq. 4).

B batch, K drafts, V vocab, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dspark_hf.generation.drafting.interface import Sampler


def sample_block(
    base_logits: Tensor,
    hidden_states: Tensor,
    anchor_ids: Tensor,
    sampler: Sampler,
    *,
    markov_head: Any,
    expand_logits: Callable[[Tensor], Tensor],
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Draw the drafts of a block left to right (Eq. 4).

    Takes `base_logits` `(B, K, V_draft)` and `hidden_states` `(B, K, D)` of the backbone, `anchor_ids` `(B)`, and
    `expand_logits`, which spreads proposable tokens over the target's vocabulary. `state` is the Markov head's before
    the first slot; None takes its `initial_state`.

    Returns the drafts `(B, K)`, their distributions `(B, K, V)` (None when greedy) and the previous token of every
    slot `(B, K)`.
    """
    previous = anchor_ids
    if state is None and markov_head is not None:
        state = markov_head.initial_state(hidden_states[:, 0])
    drafted: list[Tensor] = []
    probs: list[Tensor] = []
    for k in range(base_logits.shape[1]):
        logits = base_logits[:, k]
        if markov_head is not None:
            latent, state = markov_head.step(previous, hidden_states[:, k], state)
            logits = logits + markov_head.project(latent)
        so_far = torch.stack(drafted, dim=1) if drafted else anchor_ids.new_empty(len(anchor_ids), 0)
        token_ids, token_probs = sampler(k, expand_logits(logits), so_far)
        drafted.append(token_ids)
        if token_probs is not None:
            probs.append(token_probs)
        previous = token_ids
    token_ids = torch.stack(drafted, dim=1)
    previous_ids = torch.cat([anchor_ids[:, None], token_ids[:, :-1]], dim=1)
    return token_ids, torch.stack(probs, dim=1) if probs else None, previous_ids
