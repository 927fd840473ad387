"""Curves through noisy measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dspark_hf.generation.scheduling.costs.interpolation import interpolate


def fit_line(points: Mapping[int, float], weights: Mapping[int, float]) -> tuple[float, float]:
    """Return intercept and slope of the weighted least-squares line, which never falls.

    Raises:
        ValueError: if there is no point.
    """
    if not points:
        raise ValueError("`points` must hold at least one measurement, got none. Measure first.")
    places = np.array(list(points), dtype=float)
    values = np.array([points[place] for place in points])
    shares = np.array([weights[place] for place in points], dtype=float)
    shares /= shares.sum()
    centre, level = float(shares @ places), float(shares @ values)
    spread = float(shares @ (places - centre) ** 2)
    slope = 0.0 if spread == 0 else max(float(shares @ ((places - centre) * (values - level))) / spread, 0.0)
    return level - slope * centre, slope


def find_bends(
    points: Mapping[int, float], weights: Mapping[int, float], expected: Callable[[int], float], *, trust: float
) -> dict[int, float]:
    """Return by place how far a curve that is `expected` must be bent towards what was measured.

    Args:
        points: measured values by place.
        weights: how many samples are behind each of them.
        expected: the value that is expected at a place.
        trust: samples that count as much as what is expected.
    """
    return {
        place: (value - expected(place)) * weights[place] / (weights[place] + trust) for place, value in points.items()
    }


def bend_at(bends: Mapping[int, float], place: int) -> float:
    """Return how far a curve is bent at `place`: between measured places on straight lines, beyond them as there."""
    return interpolate(bends, min(place, max(bends))) if bends else 0.0
