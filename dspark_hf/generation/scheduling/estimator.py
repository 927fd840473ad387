"""The chance of acceptance from the margin between the two best draft logits, learnt while decoding.

b rows, K drafts, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# larger margins say no more, and a single proposable token has an infinite one
MAX_MARGIN = 12.0
# where the fit starts: bias and slope
_PRIOR_WEIGHTS = (-0.9, 0.7)
# how firmly: the information of about ten drafts; matrix entries of bias, both, slope
_PRIOR_INFORMATION = (2.0, 0.0, 2.0)
# what was learnt fades, so that the fit follows the text: half is gone after 1400 drafts
_MEMORY_OF_A_DRAFT = 0.9995


def top_margin(logits: Tensor) -> Tensor:
    """Return how far the best logit lies above the second, `(b)`, fp32, for `logits` `(b, V)`."""
    best = logits.topk(min(2, logits.shape[-1]), dim=-1).values.float()
    if best.shape[-1] < 2:
        return best.new_full(best.shape[:-1], MAX_MARGIN)
    # two impossible tokens have no difference
    margin = (best[..., 0] - best[..., 1]).nan_to_num(nan=0.0, posinf=MAX_MARGIN)
    return margin.clamp(0.0, MAX_MARGIN)


class AcceptanceEstimator:
    """A logistic fit of a draft's acceptance, given that its prefix is accepted, on its margin.

    The margin of draft k depends on the drafts before k only, and so does the estimate. Every round is one Newton
    step with the information gathered so far. `num_idle` counts the rounds since there was something to learn.

    Example:

        >>> import torch
        >>> estimator = AcceptanceEstimator()
        >>> low, high = estimator.estimate(torch.tensor([[0.1, 6.0]]))[0].tolist()
        >>> low < high
        True
    """

    def __init__(self) -> None:
        self.bias, self.slope = _PRIOR_WEIGHTS
        self._information = list(_PRIOR_INFORMATION)
        self.num_idle = 0

    def estimate(self, margins: Tensor) -> Tensor:
        """Return the chance of acceptance `(b, K)`, fp32, for `margins` `(b, K)`."""
        return torch.sigmoid(self.bias + self.slope * margins)

    def chance(self, margins: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what `estimate` does, on the host and in fp64."""
        return 1 / (1 + np.exp(-(self.bias + self.slope * margins)))

    def learn(
        self, margins: Sequence[Sequence[float]], num_verified: Sequence[int], num_accepted: Sequence[int]
    ) -> None:
        """Learn from one round: of each row the first `num_accepted` drafts were accepted, the next verified not."""
        pairs = list(_observed(margins, num_verified, num_accepted))
        if not pairs:
            self.num_idle += 1
            return
        self.num_idle = 0
        kept = _MEMORY_OF_A_DRAFT ** len(pairs)
        first, both, second = (
            kept * part + (1 - kept) * prior for part, prior in zip(self._information, _PRIOR_INFORMATION, strict=True)
        )
        towards_bias = towards_slope = 0.0
        for margin, is_accepted in pairs:
            chance = 1 / (1 + math.exp(-(self.bias + self.slope * margin)))
            weight = chance * (1 - chance)
            first, both, second = first + weight, both + weight * margin, second + weight * margin * margin
            towards_bias += is_accepted - chance
            towards_slope += (is_accepted - chance) * margin
        self._information = [first, both, second]
        determinant = first * second - both * both
        self.bias += (second * towards_bias - both * towards_slope) / determinant
        # a larger margin never speaks against a draft
        self.slope = max(self.slope + (first * towards_slope - both * towards_bias) / determinant, 0.0)


def _observed(
    margins: Sequence[Sequence[float]], num_verified: Sequence[int], num_accepted: Sequence[int]
) -> Iterator[tuple[float, bool]]:
    """Yield margin and fate of every draft that was verified behind an accepted prefix."""
    for row, verified, accepted in zip(margins, num_verified, num_accepted, strict=True):
        for slot in range(min(verified, accepted + 1)):
            yield row[slot], slot < accepted
