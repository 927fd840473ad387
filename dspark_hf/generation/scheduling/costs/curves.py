"""Curves through noisy measurements, and values between them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping

import numpy as np


def interpolate(points: Mapping[int, float], at: int) -> float:
    """Return the value at `at`, on straight lines between the measured `points`.

    Steps, up or down, stay where they were measured. Beyond the last point, the line from about half-way there to the
    last point is extended, but never downwards: a line through two neighbours would extend noise, or a step. Before
    the first point, its value holds.

    Raises:
        ValueError: if there is no point.
    """
    places = deciding_places(points, at)
    if len(places) == 1:
        return points[places[0]]
    left, right = places
    value = points[left] + (at - left) / (right - left) * (points[right] - points[left])
    return value if at < right else max(points[right], value)


def deciding_places(places: Iterable[int], at: int) -> tuple[int, ...]:
    """Return the one or two of the measured `places` that the value at `at` follows from, in ascending order.

    Raises:
        ValueError: if there is none.
    """
    ordered = sorted(places)
    if not ordered:
        raise ValueError("`points` must hold at least one measurement, got none. Measure first.")
    right = bisect_left(ordered, at)
    if right < len(ordered):
        is_alone = ordered[right] == at or right == 0
        return (ordered[right],) if is_alone else (ordered[right - 1], ordered[right])
    last = ordered[-1]
    before = ordered[:-1]
    return (max([place for place in before if 2 * place <= last], default=before[0]), last) if before else (last,)


def fit_line(
    points: Mapping[int, float], weights: Mapping[int, float], *, tilt: float = 0.0, trust: float = 0.0
) -> tuple[float, float]:
    """Return intercept and slope of the weighted least-squares line, which never falls.

    Args:
        points: values by place.
        weights: how many samples each of them stands for.
        tilt: the slope that is expected, as a share of the value at place 0; a single place says nothing of it.
        trust: how firmly: as much as that many samples that lie one place apart from the mean.

    Raises:
        ValueError: if there is no point.
    """
    if not points:
        raise ValueError("`points` must hold at least one measurement, got none. Measure first.")
    places = np.array(list(points), dtype=float)
    values = np.array([points[place] for place in points])
    shares = np.array([weights[place] for place in points], dtype=float)
    total = shares.sum()
    shares /= total
    centre, level = float(shares @ places), float(shares @ values)
    spread = float(shares @ (places - centre) ** 2) + trust / total
    expected = tilt * level / (1 + tilt * centre) * trust / total
    slope = (float(shares @ ((places - centre) * (values - level))) + expected) / spread if spread else 0.0
    slope = max(slope, 0.0)
    return level - slope * centre, slope


def find_bends(
    points: Mapping[int, float], weights: Mapping[int, float], expected: Callable[[int], float], *, trust: float
) -> dict[int, float]:
    """Return, by place, how far to move the `expected` curve towards what was measured.

    Args:
        points: measured values by place.
        weights: how many samples each of them is the median of.
        expected: the value that is expected at a place.
        trust: the number of samples that weighs as much as the expected value.
    """
    return {
        place: (value - expected(place)) * weights[place] / (weights[place] + trust) for place, value in points.items()
    }


def bend_at(bends: Mapping[int, float], place: int) -> float:
    """Return how far the curve is moved at `place`: interpolated between measured places, constant beyond them."""
    return interpolate(bends, min(place, max(bends))) if bends else 0.0
