"""The sequential part of drafting: a chain of tokens, each drawn in the knowledge of those before it (Eq. 4).

B batch, K drafts, V vocab, n proposable tokens, k candidates, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspark_hf.generation.drafting.interface import CandidateSampler, Sampler


def sample_block(
    base_logits: Tensor,
    hidden_states: Tensor,
    anchor_ids: Tensor,
    sampler: Sampler,
    *,
    markov_head: Any,
    vocab_size: int,
    proposable_ids: Tensor | None = None,
    markov_top_k: int | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Draw the drafts of a block left to right (Eq. 4).

    Takes `base_logits` `(B, K, n)` and `hidden_states` `(B, K, D)` of the backbone, `anchor_ids` `(B)`, and the ids
    `(n,)` of the proposable tokens, None for the whole vocabulary. `state` is the Markov head's before the first
    slot; None takes its `initial_state`. With `markov_top_k` the Markov head corrects only so many tokens of each
    slot, those with the best base logits, and the others are not proposed.

    Distributions stay as narrow as the choice is, and are spread over the vocabulary once, for the verification.

    Returns the drafts `(B, K)`, their distributions `(B, K, V)` (None when greedy) and the previous token of every
    slot `(B, K)`.
    """
    previous = anchor_ids
    base_logits, best, state = choose_candidates(base_logits, hidden_states, markov_head, markov_top_k, state)
    candidates = best if proposable_ids is None else proposable_ids if best is None else proposable_ids[best]
    drafted: list[Tensor] = []
    probs: list[Tensor] = []
    for k in range(base_logits.shape[1]):
        logits, state = correct(
            base_logits[:, k], markov_head, previous, hidden_states[:, k], state, _of_slot(best, k)
        )
        so_far = torch.stack(drafted, dim=1) if drafted else anchor_ids.new_empty(len(anchor_ids), 0)
        token_ids, token_probs = _draw_slot(sampler, k, logits, so_far, _of_slot(candidates, k), vocab_size)
        drafted.append(token_ids)
        if token_probs is not None:
            probs.append(token_probs)
        previous = token_ids
    token_ids = torch.stack(drafted, dim=1)
    previous_ids = torch.cat([anchor_ids[:, None], token_ids[:, :-1]], dim=1)
    return token_ids, _spread(probs, candidates, vocab_size), previous_ids


def choose_candidates(
    base_logits: Tensor, hidden_states: Tensor, markov_head: Any, count: int | None, state: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the logits `(B, K, k)` that the Markov head corrects, where they stand, and its state before the first.

    These are the `count` best ones of every slot; None for the places means all, `count` None too.
    """
    if markov_head is None:
        return base_logits, None, state
    state = markov_head.initial_state(hidden_states[:, 0]) if state is None else state
    best = _best_places(base_logits, count)
    return base_logits if best is None else base_logits.gather(-1, best), best, state


def correct(
    logits: Tensor,
    markov_head: Any,
    previous: Tensor,
    hidden_states: Tensor,
    state: Tensor | None,
    where: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return a slot's logits `(B, k)`, corrected behind the `previous` tokens `(B)`, and the Markov head's next state.

    `hidden_states` `(B, D)` are the slot's; the logits stand at `where` `(B, k)` among all, None if they are all.
    """
    if markov_head is None:
        return logits, state
    latent, state = markov_head.step(previous, hidden_states, state)
    return logits + (markov_head.project(latent) if where is None else markov_head.project_to(latent, where)), state


def _best_places(base_logits: Tensor, count: int | None) -> Tensor | None:
    """Return where the `count` best logits `(B, K, n)` of every slot stand, `(B, K, k)`; None for all."""
    if count is None or count >= base_logits.shape[-1]:
        return None
    # in the vocabulary's order, so that a tie goes to the token that it goes to among all of them
    return base_logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values


def _of_slot(candidates: Tensor | None, slot: int) -> Tensor | None:
    return candidates[:, slot] if candidates is not None and candidates.ndim == 3 else candidates


def _draw_slot(
    sampler: Sampler, slot: int, logits: Tensor, so_far: Tensor, candidates: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor | None]:
    """Return the draft `(B,)` of a slot and its distribution `(B, n)`, or `(B, V)` where ids have a say in it."""
    if candidates is None:
        return sampler(slot, logits, so_far)
    if isinstance(sampler, CandidateSampler) and sampler.takes_candidates:
        return sampler.among(slot, logits, so_far, candidates)
    full = logits.new_full((len(logits), vocab_size), float("-inf"))
    return sampler(slot, full.scatter_(-1, candidates.expand(len(logits), -1), logits), so_far)


def _spread(probs: list[Tensor], candidates: Tensor | None, vocab_size: int) -> Tensor | None:
    """Return the slots' distributions over the vocabulary, `(B, K, V)`."""
    if not probs:
        return None
    stacked = torch.stack(probs, dim=1)
    if candidates is None or stacked.shape[-1] == vocab_size:
        return stacked
    places = candidates.to(stacked.device).expand(stacked.shape)
    return stacked.new_zeros(*stacked.shape[:2], vocab_size).scatter_(-1, places, stacked)
