"""Values between measured points."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping


def interpolate(points: Mapping[int, float], at: int) -> float:
    """Return the value at `at`, on straight lines between the measured `points`.

    Steps, up or down, stay where they were measured. Beyond the last point the line from half-way there is extended,
    so that neither noise nor a step between two neighbours is, but never downwards; before the first one the first
    holds.

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
    """Return the one or two of the measured `places` that decide about `at`, in ascending order.

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
