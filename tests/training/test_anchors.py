"""Blocks start, end and predict where the equations put them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_hf.training.anchors import sample_blocks


def _all_anchors(mask: list[bool]) -> list[int]:
    return [place for place in range(len(mask) - 1) if mask[place] and mask[place + 1]]


@settings(max_examples=150, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=2, max_size=14),
    num_anchors=st.integers(1, 16),
    block_size=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_equals_brute_force(mask: list[bool], num_anchors: int, block_size: int, seed: int) -> None:
    """A drafter would be trained on slots that predict a prompt, another position or nothing."""
    generator = torch.Generator().manual_seed(seed)
    blocks = sample_blocks(torch.tensor(mask), num_anchors, block_size, generator)
    anchors = blocks.anchors.tolist()
    candidates = _all_anchors(mask)
    assert anchors == sorted(set(anchors))
    assert set(anchors) <= set(candidates)
    assert len(anchors) == min(num_anchors, len(candidates))
    for row, anchor in enumerate(anchors):
        reachable = True
        for k in range(block_size):
            label = anchor + k + 1
            reachable = reachable and label < len(mask) and mask[label]
            assert bool(blocks.valid[row, k]) == reachable
            if reachable:
                assert int(blocks.label_positions[row, k]) == label
                assert int(blocks.previous_positions[row, k]) == label - 1
    # slots that do not count must still be safe to look up
    for positions in (blocks.label_positions, blocks.previous_positions):
        assert positions.shape == (len(anchors), block_size)
        assert positions.numel() == 0 or 0 <= int(positions.min()) <= int(positions.max()) < len(mask)


def test_every_anchor_is_as_likely() -> None:
    """Some positions of a conversation would be trained more than others."""
    mask = torch.ones(9, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(9)
    draws = 4000
    for _ in range(draws):
        counts[sample_blocks(mask, 2, 3, generator).anchors] += 1
    # 8 candidates, 2 a draw: standard deviation 0.0068 of a frequency of 0.25
    assert (counts[:8] / draws - 0.25).abs().max() < 5 * 0.0068
    assert counts[8] == 0
