"""Which sizes are measured."""

from __future__ import annotations

import pytest

from dspark_hf.profiling.grid import make_grid


def test_defaults():
    """Steps of the cost are jumped over, or a whole block is not measured."""
    grid = make_grid(None, None, None, block_size=5, max_positions=None)
    assert grid.widths == (1, 2, 3, 4, 5, 6)
    assert grid.drafts == (1, 3, 5)
    assert grid.rows[0] == 1
    assert make_grid(None, None, None, block_size=None, max_positions=None).drafts == ()


def test_plain_decoding_and_whole_blocks_are_always_measured():
    """A scheduler has nothing to compare with, or measures anew."""
    grid = make_grid("4", "2,3", "64", block_size=5, max_positions=100)
    assert (grid.rows, grid.widths, grid.contexts) == ((1, 4), (1, 2, 3, 6), (64,))
    assert grid.shapes == [(1, 64), (4, 64)]
    assert grid.passes((4, 64)) == [(4, 64, 1), (4, 64, 2), (4, 64, 3), (4, 64, 6)]
    assert grid.blocks((4, 64)) == [(4, 64, 1), (4, 64, 3), (4, 64, 5)]


def test_contexts_fit_the_target():
    """A default runs past the target's last position."""
    assert make_grid(None, None, None, block_size=7, max_positions=100).contexts == (92,)
    assert make_grid(None, None, None, block_size=7, max_positions=600).contexts == (128, 592)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "0", "-1", "1.5", "1 2", "²"])
def test_sizes_are_positive_integers(text):
    """A typing error measures something else."""
    with pytest.raises(ValueError, match="`--widths` must be positive integers separated by commas"):
        make_grid(None, text, None, block_size=None, max_positions=None)


@pytest.mark.parametrize(("contexts", "max_positions"), [("93", 100), (None, 8)])
def test_contexts_that_do_not_fit(contexts, max_positions):
    """Positions that the target does not know are measured."""
    with pytest.raises(ValueError, match="`--contexts` must leave room for a pass of 8"):
        make_grid(None, None, contexts, block_size=7, max_positions=max_positions)
