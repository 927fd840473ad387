"""Values between measured points."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping


def interpolate(points: Mapping[int, float], at: int) -> float:
    """Return the value at `at`, on straight lines between the measured `points`.

    Steps, up or down, stay where they were measured. Beyond the last point the last two are extended, but never
    downwards; before the first one the first holds.

    Raises:
        ValueError: if there is no point.
    """
    if not points:
        raise ValueError("`points` must hold at least one measurement, got none. Measure first.")
    places = sorted(points)
    right = bisect_left(places, at)
    if right < len(places) and places[right] == at:
        return points[at]
    if right == 0:
        return points[places[0]]
    if right < len(places):
        return _on_line(points, places[right - 1], places[right], at)
    last = points[places[-1]]
    return last if len(places) == 1 else max(last, _on_line(points, places[-2], places[-1], at))


def _on_line(points: Mapping[int, float], left: int, right: int, at: int) -> float:
    share = (at - left) / (right - left)
    return points[left] + share * (points[right] - points[left])
