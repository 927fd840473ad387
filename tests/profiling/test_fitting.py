"""Curves through noisy measurements."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_hf.profiling.fitting import fit_line, never_falling, smooth_curve


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


def test_never_falling_is_the_closest_such_sequence():
    """Another sequence that never falls lies closer to the measurements."""
    generator = np.random.default_rng(1)
    for _ in range(50):
        values, weights = generator.normal(size=6), generator.uniform(0.1, 5, size=6)
        found = np.array(never_falling(values.tolist(), weights.tolist()))
        assert (np.diff(found) >= -1e-12).all()
        # optimality: no small step within the cone of such sequences comes closer
        loss = (weights * (found - values) ** 2).sum()
        for _ in range(200):
            other = np.maximum.accumulate(found + 0.05 * generator.normal(size=6))
            assert (weights * (other - values) ** 2).sum() >= loss - 1e-9


def test_smooth_curve_trusts_many_samples_and_the_line_elsewhere():
    """Well measured costs are smoothed away, or unmeasured ones jump to something that was never seen."""
    line = [11.0, 12.0, 13.0, 14.0, 15.0, 16.0]
    measured = smooth_curve({1: 20.0, 4: 25.0}, {1: 1e6, 4: 1e6}, line, trust=4.0)
    assert measured[0] == pytest.approx(20.0, abs=1e-3)
    assert measured[3] == pytest.approx(25.0, abs=1e-3)
    # the bend is nine at 1, eleven at 4, and stays eleven beyond
    assert measured[1] == pytest.approx(12 + 9 + 2 / 3, abs=1e-3)
    assert measured[5] == pytest.approx(16 + 11, abs=1e-3)
    assert smooth_curve({}, {}, line, trust=4.0) == pytest.approx(line)
    # as many samples as are trusted in the line: halfway
    assert smooth_curve({2: 14.0}, {2: 4.0}, line, trust=4.0)[1] == pytest.approx(13.0)
