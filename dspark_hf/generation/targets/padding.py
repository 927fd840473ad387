"""Padding taken out of a batch, and put back.

B batch, S columns so far, T columns of a pass, W packed width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dspark_hf.generation.targets.interface import TargetPass, joined

# (token ids [B, W], how many are real per row, positions with logits) -> one pass of the target
RunPacked = Callable[[Tensor, list[int], Tensor], TargetPass]


def full_mask(input_ids: Tensor, attention_mask: Tensor | None, past_length: int, width: int) -> Tensor:
    """Return which columns are real, `(B, S)`, those that a cache of `past_length` columns holds included.

    Takes the `attention_mask` that `generate` left, and the `width` of the one that the user gave.

    Raises:
        ValueError: if a row has nothing to process, or padding behind its tokens, or the mask is not as wide as the
            text.
    """
    if past_length and width == input_ids.shape[1] <= past_length:
        raise ValueError(
            f"`input_ids` must go beyond what the cache holds when a drafter assists, got {width} columns with "
            f"{past_length} held. Crop the cache, or pass new tokens with an `attention_mask` that covers both."
        )
    if attention_mask is not None:
        if attention_mask.shape[1] not in (input_ids.shape[1], past_length + input_ids.shape[1]):
            raise ValueError(
                f"`attention_mask` must cover the {past_length + input_ids.shape[1]} columns of the text when a "
                f"drafter assists, got {attention_mask.shape[1]}. If `token_healing` changed the prompts, pass them "
                "one by one, without padding."
            )
        mask = attention_mask.bool()
        empty = (~mask[:, past_length:].any(-1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"`attention_mask` must leave every row a token when a drafter assists, got none in rows {empty}. "
                "Take these rows out, or generate without `assistant_model`."
            )
        padded = (~mask[:, -1]).nonzero().flatten().tolist()
        if padded:
            # plain `generate` goes on from the padding there, and warns
            raise ValueError(
                "`attention_mask` must end in a token of every row when a drafter assists, got padding behind rows "
                f'{padded}. Tokenize with `padding_side="left"`, or generate without `assistant_model`.'
            )
        return mask
    # generate dropped a mask of ones; its width tells whether the ids repeat what the cache holds
    width = input_ids.shape[1] if width == input_ids.shape[1] else past_length + input_ids.shape[1]
    return torch.ones(len(input_ids), width, dtype=torch.bool, device=input_ids.device)


def known_positions(config: Any, lengths: list[int], positions: Tensor, num_real: list[int]) -> Tensor:
    """Return `positions` `(B, W)`, those of padding drawn back to the last one that a learned embedding knows.

    Takes the text configuration, and how many tokens every row holds, and has of the pass.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or max(lengths) + positions.shape[1] <= limit:
        return positions
    # drafts end at the limit; a text that has come past it, as rotary embeddings let it, has all its positions
    last = [
        limit - 1 if length + count <= limit else length + positions.shape[1]
        for length, count in zip(lengths, num_real, strict=True)
    ]
    return positions.minimum(torch.tensor(last, device=positions.device)[:, None])


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


def run_packed(run: RunPacked, prompt_ids: Tensor, mask: Tensor, chunk_size: int | None = None) -> TargetPass:
    """Process prompts `(B, T)`, whose real tokens `mask` `(B, T)` marks, packed to the front of their rows.

    No more than `chunk_size` tokens of a row are given to `run` at once. Returns the pass with the logits of every
    row's last token; hidden states, if any, are laid out as the prompts are, those of the last chunk alone.
    """
    order, num_new = pack_order(mask)
    packed, size = prompt_ids.gather(1, order), chunk_size or order.shape[1]
    last = torch.tensor(num_new, device=prompt_ids.device) - 1
    passes, logits = [], [torch.empty(0, device="cpu")] * len(num_new)
    for start in range(0, order.shape[1], size):
        ids = packed[:, start : start + size]
        ending = [row for row, count in enumerate(num_new) if start < count <= start + ids.shape[1]]
        kept, index = torch.unique(last[ending] - start if ending else last[:1] * 0, return_inverse=True)
        part = run(ids, [min(max(count - start, 0), ids.shape[1]) for count in num_new], kept)
        for row, place in zip(ending, index.tolist(), strict=False):
            logits[row] = part.logits[row, place]
        passes.append(part)
    target_pass = joined(passes)
    target_pass.logits = torch.stack(logits)[:, None]
    if target_pass.hidden_states is not None:
        parts = zip(*(part.hidden_states for part in passes if part.hidden_states is not None), strict=True)
        whole = (unpack(torch.cat(states, dim=1), mask, order) for states in parts)
        first = mask.shape[1] - 1 - (mask.shape[1] - 1) % (chunk_size or mask.shape[1])
        target_pass.hidden_states = tuple(states[:, first:] for states in whole)
    return target_pass
