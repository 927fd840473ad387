"""Rows that leave the batch: the others stay where they are, and are what they were."""

from __future__ import annotations

import pytest
import torch

from dspark_hf.generation.ragged_store import RaggedStore, fill_gaps


def test_gaps_are_filled_from_the_end():
    """A row that leaves moves all rows behind it, or one is lost."""
    assert fill_gaps([0, 1, 2]) == [0, 1, 2]
    assert fill_gaps([1, 2, 3]) == [3, 1, 2]
    assert fill_gaps([0, 3, 5]) == [0, 3, 5]
    assert fill_gaps([2, 3, 6]) == [3, 6, 2]
    for live in ([0, 2, 4, 6], [4, 5, 6, 7], [1, 3, 4], [7]):
        order = fill_gaps(live)
        assert sorted(order) == live
        assert all(order[index] == index for index in live if index < len(live))


@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 1, 2], [3, 2], [1, 0], [2, 2, 0], [0, 0, 1, 1, 2, 3], [3]])
def test_selected_rows_are_the_chosen_ones(rows):
    """A row that fills a gap overwrites one that is still needed."""
    store = RaggedStore()
    keys, values = torch.randn(4, 2, 5, 3), torch.randn(4, 2, 5, 6)
    store.write(keys, values, [0] * 4, torch.zeros(4, dtype=torch.long))
    store.select_rows(torch.tensor(rows))
    kept_keys, kept_values = store.read(5)
    assert torch.equal(kept_keys, keys[rows])
    assert torch.equal(kept_values, values[rows])


def test_rows_that_stay_are_not_copied():
    """Every row that leaves costs a copy of the whole cache."""
    store = RaggedStore()
    store.write(torch.randn(4, 2, 5, 3), torch.randn(4, 2, 5, 3), [0] * 4, torch.zeros(4, dtype=torch.long))
    place = store.keys.data_ptr()
    store.select_rows(torch.tensor([0, 3, 2]))
    assert store.keys.data_ptr() == place
    assert len(store.keys) == 3
