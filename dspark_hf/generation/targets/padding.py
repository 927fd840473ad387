"""Padding taken out of a batch, and put back.

B batch, S columns so far, T columns of a pass, W packed width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dspark_hf.generation.targets.interface import TargetPass

# (token ids [B, W], how many are real per row, positions with logits) -> one pass of the target
RunPacked = Callable[[Tensor, list[int], Tensor], TargetPass]


def full_mask(input_ids: Tensor, attention_mask: Tensor | None, past_length: int, width: int) -> Tensor:
    """Return which columns are real, `(B, S)`, those that a cache of `past_length` columns holds included.

    Takes the `attention_mask` that `generate` left, and the `width` of the one that the user gave.

    Raises:
        ValueError: if a row has nothing to process.
    """
    if attention_mask is not None:
        mask = attention_mask.bool()
        empty = (~mask[:, past_length:].any(-1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"`attention_mask` must leave every row a token when a drafter assists, got none in rows {empty}. "
                "Take these rows out, or generate without `assistant_model`."
            )
        return mask
    # generate dropped a mask of ones; its width tells whether the ids repeat what the cache holds
    width = input_ids.shape[1] if width == input_ids.shape[1] else past_length + input_ids.shape[1]
    return torch.ones(len(input_ids), width, dtype=torch.bool, device=input_ids.device)


def prompt_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Return the prompts `(B, P)` as lists without padding; the mask `(B, S)` may begin with what a cache holds."""
    rows: list[list[int]] = input_ids.tolist()
    width = input_ids.shape[1]
    if attention_mask is None or not width:
        return rows
    masks = attention_mask[:, -width:].tolist()
    return [[token for token, is_real in zip(*pair, strict=True) if is_real] for pair in zip(rows, masks, strict=True)]


def pack_order(mask: Tensor) -> tuple[Tensor, list[int]]:
    """Return the columns `(B, W)` of every row's real tokens, in order, and how many there are; `mask` is `(B, T)`."""
    counts: list[int] = mask.long().sum(-1).tolist()
    order = torch.argsort((~mask).long(), dim=1, stable=True)
    return order[:, : max(counts)], counts


def unpack(states: Tensor, mask: Tensor, order: Tensor) -> Tensor:
    """Return packed states `(B, W, *)` laid out as in the padded batch `(B, T, *)`, zeros where padding was."""
    mask, order = mask.to(states.device), order.to(states.device)
    padded = states.new_zeros(*mask.shape, *states.shape[2:])
    padded[torch.arange(len(states), device=states.device)[:, None], order] = states
    return padded.masked_fill(~mask.view(*mask.shape, *[1] * (states.ndim - 2)), 0)


def run_packed(run: RunPacked, prompt_ids: Tensor, mask: Tensor) -> TargetPass:
    """Process prompts `(B, T)`, whose real tokens `mask` `(B, T)` marks, packed to the front of their rows.

    Returns the pass with the logits of every row's last token; hidden states, if any, are laid out as the prompts are.
    """
    order, num_new = pack_order(mask)
    last = torch.tensor(num_new, device=prompt_ids.device) - 1
    kept, index = torch.unique(last, return_inverse=True)
    target_pass = run(prompt_ids.gather(1, order), num_new, kept)
    rows = torch.arange(len(prompt_ids), device=target_pass.logits.device)
    target_pass.logits = target_pass.logits[rows, index.to(rows.device)][:, None]
    if target_pass.hidden_states is not None:
        target_pass.hidden_states = tuple(unpack(states, mask, order) for states in target_pass.hidden_states)
    return target_pass
