"""Curves through noisy measurements: what a larger step costs is at least what a smaller one does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dspark_hf.profiling.interpolation import interpolate


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


def never_falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the sequence closest to `values`, in weighted squares, that never falls (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (left, left_weight, left_size), (right, right_weight, right_size) = pools[-2:]
            weight = left_weight + right_weight
            pools[-2:] = [((left * left_weight + right * right_weight) / weight, weight, left_size + right_size)]
    return [value for value, _, size in pools for _ in range(size)]


def smooth_curve(
    points: Mapping[int, float], weights: Mapping[int, float], expected: Sequence[float], *, trust: float
) -> list[float]:
    """Return the values at 1, 2 and so on: those `expected`, bent towards what was measured, that never fall.

    Args:
        points: measured values by place, none beyond the last expected one.
        weights: how many samples are behind each of them.
        expected: what is expected where nothing was measured.
        trust: samples that count as much as what is expected.
    """
    bends = {
        place: (value - expected[place - 1]) * weights[place] / (weights[place] + trust)
        for place, value in points.items()
    }
    last = max(bends, default=0)
    values = []
    for place, value in enumerate(expected, start=1):
        # beyond the last measurement its bend stays
        values.append(value + (0.0 if not bends else bends[last] if place > last else interpolate(bends, place)))
    return never_falling(values, [weights.get(place, 0) + trust for place in range(1, len(values) + 1)])
