"""Drafts that branch: the most probable paths of a block, grown slot by slot over the Markov head (Eq. 4).

K slots, N drafts, n proposable tokens, k candidates, p paths, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspark_hf.generation.drafting.chain import choose_candidates, correct


def grow_tree(
    base_logits: Tensor,
    hidden_states: Tensor,
    anchor_ids: Tensor,
    num_drafts: int,
    *,
    markov_head: Any,
    proposable_ids: Tensor | None = None,
    markov_top_k: int | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `num_drafts` most probable paths of one row's block, as one tree.

    Takes `base_logits` `(1, K, n)` and `hidden_states` `(1, K, D)` of the backbone, `anchor_ids` `(1)`; the others are
    those of `sample_block`. A path is as probable as its last token and all before it are together, by the drafter. A
    path has no more probability than the one that it continues, so all that lead to a draft are in the tree too.

    Nothing is drawn: the tree follows from the logits.

    Returns the drafts `(1, N)`, the most probable path first, each draft's parent `(1 + N)` as `DraftedBlock.parents`
    has them, and the paths' log-probabilities `(N,)`, fp32.
    """
    base_logits, best, state = choose_candidates(base_logits, hidden_states, markov_head, markov_top_k, state)
    # the anchor leads to all others
    token_ids, parents = anchor_ids, anchor_ids.new_full((1,), -1)
    log_probs = base_logits.new_zeros(1, dtype=torch.float32)
    # which of these may grow
    ends = anchor_ids.new_zeros(1)
    for slot in range(base_logits.shape[1]):
        # one row for every path
        logits, hidden = (values[:, slot].expand(len(ends), -1) for values in (base_logits, hidden_states))
        where = None if best is None else best[:, slot].expand(len(ends), -1)
        logits, state = correct(logits, markov_head, token_ids[ends], hidden, state, where)
        # weights may overflow: what is not a number is not likely
        grown = (logits.float().log_softmax(-1) + log_probs[ends, None]).nan_to_num(nan=float("-inf"))
        found = grown.flatten().topk(min(num_drafts, grown.numel()))
        sources, places = found.indices // logits.shape[-1], found.indices % logits.shape[-1]
        places = places if best is None else best[0, slot][places]
        new_ids = places if proposable_ids is None else proposable_ids[places]
        num_before = len(token_ids)
        order = torch.cat([log_probs, found.values]).sort(descending=True, stable=True).indices[: num_drafts + 1]
        moved = order.new_full((num_before + len(new_ids) + 1,), -1)
        moved[order] = torch.arange(len(order), device=order.device)
        # the last place answers for the anchor's parent, which is none
        parents = moved[torch.cat([parents, ends[sources]])[order]]
        token_ids = torch.cat([token_ids, new_ids])[order]
        log_probs = torch.cat([log_probs, found.values])[order]
        # a path that is not among the best so far leads to none that is
        is_new = moved[num_before:-1] >= 0
        ends = moved[num_before:-1][is_new]
        if not len(ends):
            break
        state = None if state is None else state[sources[is_new]]
    return token_ids[None, 1:], parents, log_probs[1:]
