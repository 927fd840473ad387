"""A drafter fitted to a target whose vocabulary grew, was padded, or shrank.

V tokens, R markov rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
    head, owns = drafter.markov_head, drafter.config.owns_embeddings
    tables = [] if head is None else [head.markov_w2] if head.is_reduced else [head.markov_w1, head.markov_w2]
    return [*tables, drafter.embed_tokens, drafter.lm_head] if owns else tables


def resized_rows(table: Tensor, size: int) -> Tensor:
    """Return `table` `(V, *)` with `size` rows: the first of them, and where there are more, their mean."""
    if size <= len(table):
        return table[:size].clone()
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(size - len(table), *table.shape[1:])])
