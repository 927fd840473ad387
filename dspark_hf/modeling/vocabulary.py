"""A drafter fitted to a target whose vocabulary grew, was padded, or shrank, or to text that uses other tokens.

V tokens, R markov rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dspark_hf.generation.targets.adapter import TargetAdapter


def resize_vocabulary(drafter: Any, size: int) -> None:
    """Let a drafter count `size` tokens, as its target does now.

    What it holds of tokens are the Markov head's tables, and its embedding and output head where they are its own. New
    rows are the mean of those there are: a new token is followed, and follows, as the average token does. The
    proposable tokens of a reduced draft vocabulary stay the same.

    Raises:
        ValueError: if a token that the drafter needs would be gone.
    """
    config = drafter.config
    ids = drafter.draft_token_ids
    needed = max(config.mask_token_id, -1 if ids is None else int(ids.max()))
    if size <= needed:
        raise ValueError(
            f"`new_num_tokens` must be more than {needed}, a token that fills this drafter's blocks or is proposed, "
            f"got {size}. Make a drafter for the smaller vocabulary."
        )
    is_reduced = ids is not None
    for module in _tables(drafter):
        # logits over a draft vocabulary keep its size
        if is_reduced and isinstance(module, nn.Linear):
            continue
        module.weight = nn.Parameter(resized_rows(module.weight.data, size), module.weight.requires_grad)
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", size)
    config.vocab_size = size
    if ids is not None:
        drafter.t2d = drafter.t2d.new_zeros(size)
        drafter.t2d[ids] = True


def _tables(drafter: Any) -> list[Any]:
    """Return the modules with a row for every token, or every proposable one."""
    head, config = drafter.markov_head, drafter.config
    tables = [] if head is None else [head.markov_w2] if head.is_reduced else [head.markov_w1, head.markov_w2]
    own = [drafter.embed_tokens] if config.owns_embeddings else []
    # either may be lent by the target, and the other not
    return [*tables, *own, *([drafter.lm_head] if config.owns_head else [])]


def resized_rows(table: Tensor, size: int) -> Tensor:
    """Return `table` `(V, *)` with `size` rows: the first of them, and where there are more, their mean."""
    if size <= len(table):
        return table[:size].clone()
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(size - len(table), *table.shape[1:])])


def choose_vocabulary(drafter: Any, token_ids: Tensor | None, target: TargetAdapter) -> Any:
    """Return a drafter that may propose other tokens, and is otherwise the same.

    Rows of tokens that it could propose before are kept. A new one is favoured by the Markov head as the average token
    is, and read by it as before: a head over the draft vocabulary read all others in one row. In an output head of the
    drafter's own it has the target's row.

    Args:
        drafter: the drafter; left as it is.
        token_ids: the tokens `(V_draft,)` that it may propose from now on; None for all.
        target: its target.

    Raises:
        ValueError: if `token_ids` are no different tokens of the vocabulary, or the target's rows are out of reach.
    """
    ids = None if token_ids is None else torch.unique(token_ids.to(drafter.device))
    config = copy.deepcopy(drafter.config)
    config.draft_vocab_size = None if ids is None else len(ids)
    config.markov_over_draft_vocab = config.markov_over_draft_vocab and ids is not None
    chosen = type(drafter)(config).to(device=drafter.device, dtype=drafter.dtype)
    if ids is not None:
        chosen.set_draft_token_ids(ids)
    weights = {name: x for name, x in drafter.state_dict().items() if name not in ("d2t", "t2d")}
    weights.pop("markov_head.known_ids", None)
    every = torch.arange(config.vocab_size, device=drafter.device)
    wanted = every if ids is None else ids
    if drafter.markov_head is not None:
        read = drafter.markov_head.markov_w1.weight
        if drafter.markov_head.is_reduced:
            of_all = drafter.markov_head.embed(every)
            weights["markov_head.markov_w1.weight"] = (
                torch.cat([of_all[wanted], read[-1:]]) if config.markov_over_draft_vocab else of_all
            )
        written = drafter.markov_head.markov_w2.weight
        mean = written.float().mean(0, keepdim=True).to(written.dtype)
        weights["markov_head.markov_w2.weight"] = _rows(drafter, written, wanted, mean.expand(len(wanted), -1))
    if drafter.config.owns_head:
        rows = target.head_rows(wanted.cpu())
        if rows is None:
            raise ValueError(
                "`target` must have an output head in floating point to choose a draft vocabulary for a drafter with "
                "one of its own, got a quantised one. Keep the drafter's vocabulary."
            )
        lent = rows[0].to(drafter.lm_head.weight)
        weights["lm_head.weight"] = _rows(drafter, drafter.lm_head.weight, wanted, lent)
    chosen.load_state_dict({**chosen.state_dict(), **weights})
    chosen.recommended = drafter.recommended
    return chosen.train(drafter.training)


def _rows(drafter: Any, table: Tensor, wanted: Tensor, new: Tensor) -> Tensor:
    """Return the rows of `wanted` tokens: those of `table`, with one for each proposable token, or else of `new`."""
    ids = drafter.draft_token_ids
    if ids is None:
        return table[wanted].clone()
    place = torch.full((drafter.config.vocab_size,), -1, device=table.device)
    place[ids] = torch.arange(len(ids), device=table.device)
    at = place[wanted]
    return torch.where((at >= 0)[:, None], table[at.clamp_min(0)], new)
