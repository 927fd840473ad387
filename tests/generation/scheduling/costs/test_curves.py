"""Curves through noisy measurements."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_hf.generation.scheduling.costs.curves import bend_at, find_bends, fit_line


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
