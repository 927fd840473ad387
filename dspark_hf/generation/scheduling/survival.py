"""The chance that a draft and all before it are accepted, and how far a pass should go.

b rows, K drafts; level j is draft j of every row, its gain the number of them expected to be accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dspark_hf.generation.scheduling.interface import Batch


def prefix_survival(confidence: Tensor) -> Tensor:
    """Return the chance `(b, K)` that each draft and all before it are accepted (Section 3.3 of the paper)."""
    return torch.cumprod(confidence, dim=-1)


def possible_survival(confidence: Tensor, batch: Batch) -> Tensor:
    """Return `prefix_survival` on the host, zero where a row has no room: what cannot be used is worth nothing."""
    survival = prefix_survival(confidence.float().cpu())
    # the user's default device may be another
    slots = torch.arange(survival.shape[1], device="cpu")
    return survival * (slots < torch.tensor(batch.limits, device="cpu")[:, None])


def stop_level(gains: Sequence[float], num_live: int, seconds: Callable[[int], float]) -> int:
    """Return how many levels to verify: the first that does not raise the throughput is out, and all after it.

    Algorithm 1 of the paper for a padded batch. Whether level j is in depends on the gains up to j only, so on drafts
    before it: a later gain must not bring it back.

    Args:
        gains: the gain of every level.
        num_live: rows that get a token of the target's own.
        seconds: the time of a round that verifies that many levels.
    """
    expected = float(num_live)
    best = expected / seconds(0)
    for level, gain in enumerate(gains, start=1):
        expected += gain
        throughput = expected / seconds(level)
        if throughput <= best:
            return level - 1
        best = throughput
    return len(gains)


def best_level(gains: Sequence[float], num_live: int, seconds: Callable[[int], float]) -> int:
    """Return how many levels give the highest throughput of all.

    A search over what all drafts led to: use it for later rounds, never for the one the gains come from.
    """
    expected, best, found = float(num_live), num_live / seconds(0), 0
    for level, gain in enumerate(gains, start=1):
        expected += gain
        throughput = expected / seconds(level)
        if throughput > best:
            best, found = throughput, level
    return found
