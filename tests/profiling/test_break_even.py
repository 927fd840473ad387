"""From which accepted length on drafting pays, on the screen and in the figure."""

from __future__ import annotations

import pytest
from rich.console import Console

from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable
from dspark_hf.profiling.break_even import break_even
from dspark_hf.profiling.cost_tables import print_costs

PASSES = {(rows, 128, width): 0.02 * rows + 0.002 * width for rows in (1, 2) for width in (1, 3, 6)}
BLOCKS = {(rows, 128, count): 0.001 * count for rows in (1, 2) for count in (2, 4, 5)}
TABLE = CostTable(CostCurves(PASSES), CostCurves(BLOCKS))


def test_a_round_at_break_even_is_as_fast_as_plain_steps():
    """Drafting is recommended where it loses, or not where it gains."""
    for rows in (1, 2):
        taus = break_even(TABLE, rows, 128)
        # a pass of width 5 was not measured
        assert list(taus) == [2, 5]
        for count, tau in taus.items():
            plain_seconds = tau * PASSES[rows, 128, 1]
            assert plain_seconds == pytest.approx(BLOCKS[rows, 128, count] + PASSES[rows, 128, 1 + count])
    assert break_even(TABLE, 3, 128) == {}


def test_the_screen_says_when_drafting_pays():
    """`profile` prints what passes cost and leaves the reader to work out what follows."""
    console = Console(width=80, record=True, no_color=True)
    print_costs(TABLE, console)
    text = console.export_text()
    assert "Drafting pays from this tau on" in text
    assert f"{break_even(TABLE, 2, 128)[5]:.2f}" in text.partition("Drafting pays")[2]
    # a target alone has nothing to say of drafting
    console = Console(width=80, record=True, no_color=True)
    print_costs(CostTable(CostCurves(PASSES)), console)
    assert "Drafting pays" not in console.export_text()
