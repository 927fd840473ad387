"""Curves through noisy measurements."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_hf.generation.scheduling.costs.curves import bend_at, deciding_places, find_bends, fit_line, interpolate

# flat up to 4, a step to 8, flat again, a step down
STAIRCASE = {1: 10.0, 2: 10.0, 4: 10.0, 5: 18.0, 8: 18.0, 9: 16.0, 16: 16.0}


def test_line_is_the_weighted_least_squares_one():
    """A cost that was seen once counts as much as one that was seen a hundred times."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        places = sorted({int(place) for place in generator.integers(1, 40, size=6)} | {1, 40})
        points = {place: 3.0 + 0.5 * place + float(generator.normal()) for place in places}
        weights = {place: float(generator.uniform(0.5, 15)) for place in places}
        intercept, slope = fit_line(points, weights)
        expected = np.polyfit(places, list(points.values()), 1, w=np.sqrt(list(weights.values())))
        np.testing.assert_allclose((slope, intercept), expected, rtol=1e-8)


def test_line_never_falls():
    """A wider pass is believed to be cheaper because of noise."""
    assert fit_line({1: 5.0, 2: 4.0}, {1: 1.0, 2: 3.0}) == pytest.approx((4.25, 0.0))


def test_line_needs_a_measurement():
    """Costs are made up from nothing."""
    with pytest.raises(ValueError, match="`points` must hold at least one measurement"):
        fit_line({}, {})


def test_bends_trust_many_samples_and_what_is_expected_elsewhere():
    """Well measured costs are smoothed away, or unmeasured ones jump to something that was never seen."""

    def line(place: int) -> float:
        return 10.0 + place

    measured = find_bends({1: 20.0, 4: 25.0}, {1: 1e6, 4: 1e6}, line, trust=4.0)
    # straight between them, and beyond the last as there
    places = (1, 2, 4, 6)
    assert [bend_at(measured, place) for place in places] == pytest.approx([9, 9 + 2 / 3, 11, 11], abs=1e-3)
    # as many samples as are trusted in the line: halfway
    assert bend_at(find_bends({2: 14.0}, {2: 4.0}, line, trust=4.0), 2) == pytest.approx(1.0)


def test_curves_without_measurements_are_not_bent():
    """Nothing measured bends a curve, or breaks it."""
    assert bend_at(find_bends({}, {}, float, trust=4.0), 3) == 0.0


def test_bends_may_fall():
    """A wider step that is really quicker is not believed."""
    bends = find_bends({3: 20.0, 4: 10.0}, {3: 1e6, 4: 1e6}, lambda place: 14.0, trust=4.0)
    assert [bend_at(bends, place) for place in (3, 4)] == pytest.approx([6.0, -4.0], abs=1e-3)


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
