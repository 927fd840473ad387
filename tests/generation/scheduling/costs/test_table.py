"""Costs by rows, context and size."""

from __future__ import annotations

import pytest

from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable


def _cost(rows: int, context: int, size: int) -> float:
    return 1 + 0.5 * rows + 0.001 * context + 0.25 * size


def _curves(rows=(1, 4), contexts=(128, 1024), sizes=(1, 4, 8)) -> CostCurves:
    return CostCurves({(r, c, s): _cost(r, c, s) for r in rows for c in contexts for s in sizes})


@pytest.mark.parametrize(
    "point", [(1, 128, 1), (4, 1024, 8), (2, 500, 3), (8, 128, 1), (1, 9000, 2), (16, 30_000, 20)]
)
def test_linear_costs_are_met_everywhere(point):
    """Between and beyond what was measured, costs are others than they are."""
    assert _curves().at(*point) == pytest.approx(_cost(*point))


def test_costs_never_fall_with_the_context():
    """Noise makes long contexts cheaper and cheaper, down to nothing."""
    curves = CostCurves({(1, 128, 1): 2.0, (1, 512, 1): 1.5})
    assert curves.at(1, 30_000, 1) == 1.5


def test_ragged_grids():
    """A batch size that was measured on another context only cannot be looked up."""
    curves = CostCurves({(1, 128, 1): 1.0, (1, 128, 4): 2.0, (4, 3000, 1): 4.0})
    assert curves.at(4, 128, 1) == 4.0
    assert curves.at(4, 128, 4) == 4.0
    assert curves.at(2, 128, 1) == 2.0
    assert set(curves.points) == {(1, 128, 1), (1, 128, 4), (4, 3000, 1)}


@pytest.mark.parametrize(
    ("point", "is_covered"),
    [
        ((1, 128, 8), True),
        ((3, 500, 5), True),
        ((4, 4096, 8), True),
        ((4, 32, 8), True),
        ((4, 128, 9), False),
        ((5, 128, 8), False),
        ((4, 5000, 8), False),
        ((4, 31, 8), False),
    ],
)
def test_what_is_covered(point, is_covered):
    """A decision rests on numbers far from everything measured, or what was measured is measured again."""
    assert _curves().covers(*point) is is_covered


@pytest.mark.parametrize("curves", [_curves(rows=(4,)), _curves(sizes=(4, 8)), CostCurves({})])
def test_a_single_row_or_token_cannot_be_told_from_several(curves):
    """Plain decoding is thought as dear as a whole batch or a whole block."""
    assert not curves.covers(1, 128, 8)


def test_table_needs_both_models():
    """Without the drafter's costs drafting is free."""
    assert not CostTable(_curves()).covers(1, 7, 128)
    table = CostTable(_curves(), _curves(sizes=(1, 7)))
    assert table.covers(1, 7, 128)
    assert not table.covers(1, 8, 128)
    assert table.verify_seconds(4, 8, 128) == _cost(4, 128, 8)
    assert table.draft_seconds(4, 7, 128) == _cost(4, 128, 7)


def test_preferred_measurements_win():
    """The wrong one of two measurements counts, or what only one of them has is lost."""
    old = CostTable(CostCurves({(1, 128, 1): 1.0, (2, 128, 1): 2.0}), CostCurves({(1, 128, 1): 3.0}))
    merged = old.merged_with(CostTable(CostCurves({(1, 128, 1): 9.0})))
    assert merged.verify.points == {(1, 128, 1): 9.0, (2, 128, 1): 2.0}
    assert merged.draft.points == old.draft.points


# measured by chance while other programs ran, and real ones: two rows of Gemma 3 270M, whose kernels work in tiles
BUSY = {1: 0.147, 2: 0.264, 3: 0.303, 4: 0.234, 6: 0.186, 8: 0.138}
TILES = {1: 1.02, 2: 1.80, 3: 2.01, 4: 2.72, 5: 3.34, 6: 3.49, 7: 4.25, 8: 2.26}


def _one_row(by_width: dict[int, float]) -> CostCurves:
    return CostCurves({(1, 128, width): seconds for width, seconds in by_width.items()})


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_costs_are_finite_positive_seconds(seconds):
    """A schedule divides by nothing, or compares with what is no number."""
    with pytest.raises(ValueError, match="must be finite and positive"):
        _one_row({1: 1.0, 2: seconds})


def test_costs_that_fall_too_far_are_doubted():
    """Eight tokens that seem cheaper than one, and three dearer than either, decide how far to draft."""
    assert _one_row(BUSY).doubt == "138 ms for 1 x 8 tokens, but 303 ms for 1 x 3"
    assert CostTable(_one_row(TILES), _one_row(BUSY)).doubt == _one_row(BUSY).doubt
    assert CostTable(_one_row(TILES), _one_row(TILES)).doubt is None


def test_costs_in_doubt_are_lowered():
    """What other programs added stays in a measurement; or true costs are changed with it."""
    lowered = _one_row(BUSY).without_doubt()
    assert {width: seconds for (_, _, width), seconds in lowered.points.items()} == {**BUSY, 3: 0.138}
    assert lowered.doubt is None
    assert _one_row(TILES).without_doubt().points == _one_row(TILES).points
