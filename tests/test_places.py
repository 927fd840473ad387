"""Entries of rows at places of their own: what `gather` and `scatter_` give, in a fraction of their time."""

from __future__ import annotations

import pytest
import torch

from dspark_hf.places import put_at, take_at


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_entries_are_written_and_read_where_they_belong(dtype):
    generator = torch.Generator().manual_seed(1)
    store = torch.randint(100, (3, 7, 2, 5), generator=generator).to(dtype)
    entries = torch.randint(100, (3, 4, 2, 5), generator=generator).to(dtype)
    places = torch.stack([torch.randperm(7, generator=generator)[:4] for _ in range(3)])
    index = places[..., None, None].expand(-1, -1, 2, 5)
    assert torch.equal(take_at(store, places), store.gather(1, index))
    expected = store.scatter(1, index, entries)
    put_at(store, places, entries)
    assert torch.equal(store, expected)


def test_a_view_is_written_through():
    """Stores keep their heads before their slots."""
    store = torch.zeros(2, 3, 4, 5)
    put_at(store.transpose(1, 2), torch.tensor([[1], [3]]), torch.ones(2, 1, 3, 5))
    assert store.sum((1, 3)).tolist() == [[0, 15, 0, 0], [0, 0, 0, 15]]
