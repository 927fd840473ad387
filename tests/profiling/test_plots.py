"""The cost curve."""

from __future__ import annotations

import pytest

from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable
from dspark_hf.profiling.plots import draw_costs
from tests.thinning import slow

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    "points", [slow({(1, 128, 1): 0.1}), {(r, c, w): 0.1 * w for r in (1, 4) for c in (1, 9) for w in (1, 3)}]
)
@pytest.mark.parametrize("has_drafter", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_figure_is_drawn(points, has_drafter):
    """Costs cannot be drawn, with or without a drafter."""
    draft = CostCurves({(1, 128, 7): 0.1} if has_drafter else {})
    assert draw_costs(CostTable(CostCurves(points), draft), "title").startswith(b"\x89PNG")


def test_missing_matplotlib_is_told(monkeypatch):
    """A user reads a traceback instead of what to install."""
    monkeypatch.setattr("dspark_hf.figures.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`matplotlib` must be installed"):
        draw_costs(CostTable(CostCurves({(1, 128, 1): 0.1})), "title")
