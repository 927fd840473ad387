"""Estimate the chance of acceptance from the margin between the two best draft logits, while decoding.

b rows, K drafts, V vocab.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_hf.generation.locking import locked
from dspark_hf.generation.scheduling.defaults import (
    FIT_EVERY,
    LONGEST_FIT_STEP,
    MAX_MARGIN,
    NUM_FIT_STEPS,
    NUM_FITTED_DRAFTS,
    PRIOR_BIAS_AND_SLOPE,
    PRIOR_PRECISION,
)


def top_margin(logits: Tensor) -> Tensor:
    """Return how far the best logit lies above the second, `(b)`, fp32, for `logits` `(b, V)`."""
    best = logits.topk(min(2, logits.shape[-1]), dim=-1).values.float()
    if best.shape[-1] < 2:
        return best.new_full(best.shape[:-1], MAX_MARGIN)
    # where both are minus infinity their difference is not a number
    margin = (best[..., 0] - best[..., 1]).nan_to_num(nan=0.0, posinf=MAX_MARGIN)
    return margin.clamp(0.0, MAX_MARGIN)


class AcceptanceEstimator:
    """A logistic fit of a draft's acceptance, given that its prefix is accepted, on its margin.

    The margin of draft k depends only on the drafts before k, and so does the estimate. The fit uses the latest drafts
    whose fate is known. `num_idle` counts the rounds since one was last known.

    Example:

        >>> import torch
        >>> estimator = AcceptanceEstimator()
        >>> low, high = estimator.estimate(torch.tensor([[0.1, 6.0]]))[0].tolist()
        >>> low < high
        True
    """

    def __init__(self) -> None:
        self.bias, self.slope = PRIOR_BIAS_AND_SLOPE
        self.num_idle = 0
        self._seen: deque[tuple[float, bool]] = deque(maxlen=NUM_FITTED_DRAFTS)
        self._num_new = 0

    @locked
    def estimate(self, margins: Tensor) -> Tensor:
        """Return the chance of acceptance `(b, K)`, fp32, for `margins` `(b, K)`."""
        return torch.sigmoid(self.bias + self.slope * margins)

    @locked
    def chance(self, margins: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the same as `estimate`, for margins on the host, in fp64."""
        return 1 / (1 + np.exp(-(self.bias + self.slope * margins)))

    @locked
    def learn(
        self, margins: Sequence[Sequence[float]], num_verified: Sequence[int], num_accepted: Sequence[int]
    ) -> None:
        """Learn from one round: in each row the first `num_accepted` drafts were accepted and the next one was not."""
        pairs = list(_observed(margins, num_verified, num_accepted))
        self.num_idle = 0 if pairs else self.num_idle + 1
        self._seen.extend(pairs)
        self._num_new += len(pairs)
        is_early = len(self._seen) <= 2 * FIT_EVERY
        if pairs and (is_early or self._num_new >= FIT_EVERY):
            self._num_new = 0
            self.bias, self.slope = _fit(np.array(self._seen), np.array([self.bias, self.slope]))


def _fit(seen: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Return bias and slope of the most likely fit of margins and fates `(n, 2)`, starting from the last fit."""
    inputs = np.stack([np.ones(len(seen)), seen[:, 0]], axis=1)
    for _ in range(NUM_FIT_STEPS):
        chance = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (seen[:, 1] - chance) + PRIOR_PRECISION * (np.array(PRIOR_BIAS_AND_SLOPE) - weights)
        curvature = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + PRIOR_PRECISION * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        length = float(np.abs(inputs @ step).max())
        weights = weights + step * min(1.0, LONGEST_FIT_STEP / max(length, 1e-9))
        # a larger margin must not make a draft less likely
        weights[1] = max(weights[1], 0.0)
    return float(weights[0]), float(weights[1])


def _observed(
    margins: Sequence[Sequence[float]], num_verified: Sequence[int], num_accepted: Sequence[int]
) -> Iterator[tuple[float, bool]]:
    """Yield margin and fate of every draft that was verified behind an accepted prefix."""
    for row, verified, accepted in zip(margins, num_verified, num_accepted, strict=True):
        for slot in range(min(verified, accepted + 1)):
            yield row[slot], slot < accepted
