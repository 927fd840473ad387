"""Reliability diagrams are drawn where matplotlib is installed, and asked for where it is not."""

from __future__ import annotations

import sys

import pytest

from dspark_hf import figures
from dspark_hf.calibration import diagrams
from dspark_hf.calibration.diagrams import draw_reliability
from tests.calibration.synthetic import synthetic_observations
from tests.pictures import drawn_share
from tests.thinning import slow


@pytest.mark.parametrize("block_size", [slow(1), 3, slow(7)])
def test_a_diagram_is_written(tmp_path, block_size):
    """No diagram, or one with a slot missing."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "reliability.png"
    draw_reliability(path, synthetic_observations(300, [1.0] * block_size), [2.0] * block_size)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert drawn_share(path) > 0.01


def test_a_diagram_of_no_calibration_says_one_error_a_slot(tmp_path, monkeypatch):
    """A head that was never calibrated is drawn as if it had been, with the same numbers twice."""
    pytest.importorskip("matplotlib")
    figures_made = []
    monkeypatch.setattr(diagrams, "to_png", lambda figure: figures_made.append(figure) or b"")
    draw_reliability(tmp_path / "reliability.png", synthetic_observations(300, [1.0, 1.0]))
    draw_reliability(tmp_path / "reliability.png", synthetic_observations(300, [1.0, 1.0]), [2.0, 2.0])
    once, twice = ([axes.get_title(loc="left").count("%") for axes in figure.axes[:2]] for figure in figures_made)
    assert (once, twice) == ([1, 1], [2, 2])
    assert [len(figure.legends) for figure in figures_made] == [0, 1]


def test_drawing_leaves_pyplot_alone(tmp_path):
    """A diagram in a notebook changes its backend, or stays open in memory."""
    pytest.importorskip("matplotlib")
    sys.modules.pop("matplotlib.pyplot", None)
    draw_reliability(tmp_path / "reliability.png", synthetic_observations(100, [1.0]), [1.0])
    assert "matplotlib.pyplot" not in sys.modules


def test_missing_matplotlib_is_told(tmp_path, monkeypatch):
    """An import error instead of what to install."""
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'Run `pip install "dspark-hf\[eval\]"`'):
        draw_reliability(tmp_path / "reliability.png", synthetic_observations(10, [1.0]), [1.0])
