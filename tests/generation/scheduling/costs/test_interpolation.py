"""Values between measured points, and beyond them."""

from __future__ import annotations

import pytest

from dspark_hf.generation.scheduling.costs.interpolation import deciding_places, interpolate

# flat up to 4, a step to 8, flat again, a step down
STAIRCASE = {1: 10.0, 2: 10.0, 4: 10.0, 5: 18.0, 8: 18.0, 9: 16.0, 16: 16.0}


@pytest.mark.parametrize(("at", "value"), [(3, 10), (4, 10), (5, 18), (6, 18), (8, 18), (9, 16), (12, 16)])
def test_steps_stay_where_they_were_measured(at, value):
    """A staircase is smoothed: what a step costs is seen too early or too late."""
    assert interpolate(STAIRCASE, at) == value


def test_straight_lines_between_points():
    """A width that was not measured costs as much as another one."""
    assert interpolate({2: 1.0, 6: 3.0}, 3) == 1.5


@pytest.mark.parametrize("points", [{1: 2.0, 4: 8.0}, {4: 8.0}])
def test_the_first_point_holds_before_it(points):
    """What lies before the first measurement is extended, perhaps below nothing."""
    assert interpolate(points, 0) == points[min(points)]


@pytest.mark.parametrize(
    ("points", "at", "value"),
    [
        ({3: 5.0}, 30, 5.0),
        ({4: 10.0, 8: 20.0}, 12, 30.0),
        # a step between neighbours is not a slope: the line starts half-way
        ({1: 10.0, 4: 10.0, 7: 10.0, 8: 20.0}, 16, 40.0),
        # nor is noise
        ({1024: 10.0, 2000: 10.0, 2048: 11.0}, 4096, 13.0),
        # never downwards
        ({4: 10.0, 8: 9.0}, 100, 9.0),
    ],
)
def test_beyond_the_last_point(points, at, value):
    """Far away from what was measured, costs are absurd."""
    assert interpolate(points, at) == pytest.approx(value)


@pytest.mark.parametrize(("at", "places"), [(1, (2,)), (2, (2,)), (3, (2, 4)), (8, (8,)), (9, (4, 8)), (100, (4, 8))])
def test_deciding_places(at, places):
    """A place that says nothing about another one decides about it."""
    assert deciding_places([8, 2, 7, 4], at) == places


def test_nothing_measured():
    """An empty table is a division by zero, or free."""
    with pytest.raises(ValueError, match="`points` must hold at least one measurement"):
        interpolate({}, 1)
