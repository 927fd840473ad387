"""Draft through the decoding loop's interface, and keep what the drafts were drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter


@dataclass
class GreedyBlock:
    """Drafts `(B, K)`, the logits `(B, K, V)` they are the argmax of, and their confidence `(B, K)`."""

    token_ids: Tensor
    logits: Tensor
    confidence: Tensor | None


@torch.no_grad()
def draft_greedily(
    drafter: DSparkAssistantModel,
    target: TargetAdapter,
    context: Tensor,
    lengths: Sequence[int],
    anchor_ids: Sequence[int],
    *,
    num_drafts: int | None = None,
    chunk_size: int | None = None,
) -> GreedyBlock:
    """Return the block after the anchors, which follow contexts `(B, T, M * D)` of the given `lengths`.

    The context arrives `chunk_size` positions at a time, as over many rounds; default all at once.
    """
    state = drafter.start(target, len(lengths))
    chunk_size = chunk_size or context.shape[1]
    for start in range(0, context.shape[1], chunk_size):
        part = context[:, start : start + chunk_size]
        counts = [min(max(length - start, 0), part.shape[1]) for length in lengths]
        positions = torch.arange(start, start + part.shape[1]).expand(len(lengths), -1)
        state.extend(part, positions, counts)
    seen: list[Tensor] = []

    def argmax(k: int, logits: Tensor, so_far: Tensor) -> tuple[Tensor, None]:
        assert so_far.shape == (len(lengths), k)
        seen.append(logits)
        return logits.argmax(-1), None

    size = drafter.block_size if num_drafts is None else num_drafts
    block = state.draft(torch.tensor(anchor_ids), torch.tensor(lengths), size, argmax)
    assert block.probs is None
    return GreedyBlock(block.token_ids, torch.stack(seen, dim=1), block.confidence)
