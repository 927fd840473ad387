"""Oracles of calibration, one prediction at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def calibration_error(predictions: Sequence[float], outcomes: Sequence[bool], num_bins: int) -> float:
    """Return the expected calibration error in equal-width bins."""
    error = 0.0
    for number in range(num_bins):
        members = [
            index for index, value in enumerate(predictions) if min(int(value * num_bins), num_bins - 1) == number
        ]
        if members:
            believed = sum(predictions[index] for index in members) / len(members)
            seen = sum(outcomes[index] for index in members) / len(members)
            error += len(members) / len(predictions) * abs(believed - seen)
    return error


def brier(predictions: Sequence[float], outcomes: Sequence[bool]) -> float:
    """Return the mean squared difference of predictions and outcomes."""
    return sum((value - came) ** 2 for value, came in zip(predictions, outcomes, strict=True)) / len(predictions)


def auc(predictions: Sequence[float], outcomes: Sequence[bool]) -> float:
    """Return the share of pairs of a true and a false outcome that are ranked rightly, ties counting half."""
    pairs = [
        (true, false)
        for true, came in zip(predictions, outcomes, strict=True)
        if came
        for false, came_too in zip(predictions, outcomes, strict=True)
        if not came_too
    ]
    return sum(1.0 if true > false else 0.5 if true == false else 0.0 for true, false in pairs) / len(pairs)


def sequential_temperatures(
    logits: Sequence[Sequence[float]],
    num_accepted: Sequence[int],
    num_observed: Sequence[int],
    grid: Sequence[float],
    num_bins: int,
    objective: str,
) -> list[float]:
    """Return the temperatures of Section 3.2.1, slot by slot, each block on its own."""
    temperatures: list[float] = []
    for position in range(len(logits[0])):
        blocks = [index for index, count in enumerate(num_observed) if count > position]
        survived = [num_accepted[index] > position for index in blocks]
        candidates = []
        for temperature in grid:
            survival = [_survival(logits[index], [*temperatures, temperature]) for index in blocks]
            value = (
                calibration_error(survival, survived, num_bins) if objective == "ece" else brier(survival, survived)
            )
            candidates.append((round(value, 12), abs(math.log(temperature)), temperature))
        temperatures.append(min(candidates)[2])
    return temperatures


def _survival(logits: Sequence[float], temperatures: Sequence[float]) -> float:
    product = 1.0
    for logit, temperature in zip(logits, temperatures, strict=False):
        product *= 1 / (1 + math.exp(-logit / temperature))
    return product
