"""How many drafts of each row are verified.

B batch, K drafts.

What a scheduler may look at: `confidence[:, k]` is computed from the drafts before k, so it may decide about draft k
and all later ones without changing the output's distribution.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Scheduler(Protocol):
    """Choose the verified prefix of every row."""

    def admit(self, confidence: Tensor | None, num_drafts: int, batch_size: int) -> list[int]:
        """Return how many of `num_drafts` drafts to verify, per row, given `confidence` `(B, K)` if there is any."""
        ...


class FixedScheduler:
    """Verify every draft."""

    def admit(self, confidence: Tensor | None, num_drafts: int, batch_size: int) -> list[int]:
        return [num_drafts] * batch_size


class ThresholdScheduler:
    """Cut each row's block at the first draft whose confidence is below a threshold.

    Args:
        threshold: smallest confidence that is still verified, in [0, 1].
    """

    def __init__(self, threshold: float):
        self.threshold = threshold

    def admit(self, confidence: Tensor | None, num_drafts: int, batch_size: int) -> list[int]:
        if confidence is None:
            raise ValueError(
                "`assistant_confidence_threshold` must be 0 for a drafter without a confidence head, got "
                f"{self.threshold}. Leave it out, or cap the drafts with `num_assistant_tokens`."
            )
        confident = confidence >= self.threshold
        counts: list[int] = confident.long().cumprod(-1).sum(-1).tolist()
        return counts


def prefix_survival(confidence: Tensor) -> Tensor:
    """Return the chance `(B, K)` that each draft and all before it are accepted."""
    return torch.cumprod(confidence, dim=-1)
