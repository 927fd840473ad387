"""Sequential Temperature Scaling (arXiv 2607.05147, Section 3.2.1).

N blocks, K block_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dspark_hf.calibration.metrics import NUM_BINS, brier_score, expected_calibration_error
from dspark_hf.calibration.observations import Observations

# 201 temperatures from 0.1 to 10, each 2.3 % above the one before; 1 is among them
TEMPERATURE_GRID = tuple(round(10.0 ** ((step - 100) / 100), 4) for step in range(201))
MIN_REACHED = 100
OBJECTIVES = ("ece", "brier")

# (predictions [N], outcomes [N]) -> what a fit makes small
Measure = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class StsFit:
    """Fitted temperatures and how far the blocks support them.

    Args:
        temperatures: one per slot.
        num_reached: blocks whose drafts before the slot were all accepted, so that the slot's own fate is known.
        is_copied: whether the slot was reached too rarely and took the temperature of the slot before it.
        objective: what was made small, one of `OBJECTIVES`.
    """

    temperatures: tuple[float, ...]
    num_reached: tuple[int, ...]
    is_copied: tuple[bool, ...]
    objective: str


def survival_probabilities(confidence_logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Return the survival `(N, K)`, fp64, of every prefix for logits `(N, K)` and K temperatures: `a_k`."""
    scale = torch.tensor(temperatures, dtype=torch.float64)
    return (confidence_logits.double() / scale).sigmoid().cumprod(-1)


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """Return the mean of `values`, those of weight 0 left out; NaN if all are."""
    total = sum(weights)
    pairs = zip(values, weights, strict=True)
    return sum(value * weight for value, weight in pairs if weight) / total if total else math.nan


def fit_sts(
    observations: Observations,
    *,
    objective: str = "ece",
    grid: Sequence[float] = TEMPERATURE_GRID,
    num_bins: int = NUM_BINS,
    min_reached: int = MIN_REACHED,
) -> StsFit:
    """Return one temperature per slot, fitted left to right.

    With the temperatures before it fixed, slot k gets the one of `grid` that makes the objective of the survival `a_k`
    against "drafts 1 to k are all accepted" smallest; among equals, the one nearest to 1. All are 1 if the result
    would not lower the objective's mean over the slots of these very blocks.

    Args:
        observations: blocks of prompts that the drafter was not trained on.
        objective: `"ece"`, the expected calibration error, is the paper's. It is small, too, for a survival that is
            the same for every block: where about half of the drafts are accepted a high temperature makes it so, and
            a scheduler can no longer tell blocks apart. `"brier"`, the Brier score, is smallest for the true chance.
        grid: temperatures to try, all above 0, with 1 among them; default 201 from 0.1 to 10, evenly in the logarithm.
        num_bins: equal-width bins of the calibration error.
        min_reached: a slot that fewer blocks reach takes the temperature of the slot before it.

    Raises:
        ValueError: if the objective or the grid breaks its rule, or there are fewer than `min_reached` blocks.

    Example:

        >>> import torch
        >>> from dspark_hf.calibration.observations import Observations
        >>> logits, accepted = torch.full((100, 1), 2.0), torch.arange(100) % 4 != 0
        >>> observations = Observations(logits, accepted.long(), torch.ones(100).long(), torch.arange(100))
        >>> round(fit_sts(observations).temperatures[0], 1)  # 2 / 1.8 is the logit of 3 in 4
        1.8
    """
    measure = _measure(objective, num_bins)
    _check_grid(grid)
    reached = tuple(int(observations.is_reached(position).sum()) for position in range(observations.block_size))
    if reached[0] < min_reached:
        raise ValueError(
            f"`observations` must hold at least {min_reached} blocks (`min_reached`), got {reached[0]}. "
            "Use more prompts, or longer answers; `min_reached` may be lowered at the cost of noise."
        )
    temperatures: list[float] = []
    for count in reached:
        is_copied = bool(temperatures) and count < min_reached
        temperatures.append(temperatures[-1] if is_copied else _fit_slot(observations, temperatures, grid, measure))
    ones = [1.0] * observations.block_size
    if not _mean(observations, temperatures, measure) < _mean(observations, ones, measure):
        temperatures = ones
    return StsFit(tuple(temperatures), reached, tuple(count < min_reached for count in reached), objective)


def _measure(objective: str, num_bins: int) -> Measure:
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {OBJECTIVES}, got {objective!r}. The paper's is 'ece'.")
    return brier_score if objective == "brier" else partial(expected_calibration_error, num_bins=num_bins)


def _check_grid(grid: Sequence[float]) -> None:
    if 1.0 not in grid or min(grid) <= 0:
        raise ValueError(f"`grid` must hold 1.0 and numbers above 0 only, got {list(grid)}. Leave it out, or add 1.0.")


def _fit_slot(observations: Observations, fitted: Sequence[float], grid: Sequence[float], measure: Measure) -> float:
    """Return the temperature of the slot after the `fitted` ones."""
    position = len(fitted)
    mask = observations.is_observed(position)
    logits = observations.confidence_logits[mask].double()
    survived = observations.num_accepted[mask] > position
    prefix = survival_probabilities(logits[:, :position], fitted)
    before = prefix[:, -1] if position else torch.ones(len(logits), dtype=torch.float64)

    def objective(temperature: float) -> float:
        survival = before * (logits[:, position] / temperature).sigmoid()
        # what differs by rounding only is equal
        return round(measure(survival, survived), 12)

    return min(grid, key=lambda temperature: (objective(temperature), abs(math.log(temperature)), temperature))


def _mean(observations: Observations, temperatures: Sequence[float], measure: Measure) -> float:
    """Return the mean of `measure` of the survival over slots, weighted by their observations."""
    survival = survival_probabilities(observations.confidence_logits, temperatures)
    masks = [observations.is_observed(position) for position in range(observations.block_size)]
    values = [
        measure(survival[mask, position], observations.num_accepted[mask] > position)
        for position, mask in enumerate(masks)
    ]
    return weighted_mean(values, [int(mask.sum()) for mask in masks])
