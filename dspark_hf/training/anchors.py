"""Where training blocks start, and what each of their slots should predict.

B sequences, N blocks, K block_size, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class BlockTargets:
    """Blocks of sequences: `anchors` `(*, N)` and, per slot `(*, N, K)`, what surrounds it.

    Slot k predicts the token at `anchor + k + 1` from the previous token at `anchor + k`. `valid` is a prefix of each
    block: it ends where the sequence or the loss mask does.
    """

    anchors: Tensor
    previous_positions: Tensor
    label_positions: Tensor
    valid: Tensor


def sample_blocks(loss_mask: Tensor, num_anchors: int, block_size: int, generator: torch.Generator) -> BlockTargets:
    """Return up to `num_anchors` random blocks of a sequence whose `loss_mask` `(T,)` marks the target's own tokens.

    A block may start wherever its anchor and its first label are both the target's own tokens.
    """
    candidates = torch.nonzero(loss_mask[:-1] & loss_mask[1:]).squeeze(-1)
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:num_anchors]]
    anchors = chosen.sort().values
    previous = anchors[:, None] + torch.arange(block_size)
    labels = previous + 1
    inside = labels < len(loss_mask)
    labels = labels.clamp(max=len(loss_mask) - 1)
    valid = (inside & loss_mask[labels]).long().cumprod(-1).bool()
    return BlockTargets(anchors, previous.clamp(max=len(loss_mask) - 1), labels, valid)


def stack_blocks(blocks: Sequence[BlockTargets]) -> BlockTargets:
    """Return the blocks of B sequences as one `(B, N)`; blocks added to shorter ones start at 0 and are not valid."""
    most = max(len(one.anchors) for one in blocks)

    def stack(name: str) -> Tensor:
        parts = [getattr(one, name) for one in blocks]
        return torch.stack([torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])]) for part in parts])

    return BlockTargets(stack("anchors"), stack("previous_positions"), stack("label_positions"), stack("valid"))
