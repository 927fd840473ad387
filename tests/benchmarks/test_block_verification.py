"""What the benchmark of block verification counts.

B blocks, K drafts, V vocab.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.block_verification import expected_at_once, expected_by_token, recorded
from dspark_hf.generation import decoding, verification
from tests.reference.verification import accepted_chances, accepted_chances_by_token

NUM_BLOCKS, NUM_DRAFTS, VOCAB_SIZE = 20, 4, 6


def _blocks() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return drafts `(B, K)` and the distributions of drafter and target along them."""
    draft_probs = torch.randn(NUM_BLOCKS, NUM_DRAFTS, VOCAB_SIZE).softmax(-1)
    target_probs = torch.randn(NUM_BLOCKS, NUM_DRAFTS + 1, VOCAB_SIZE).softmax(-1)
    draft_ids = torch.multinomial(draft_probs.flatten(0, 1), 1).view(NUM_BLOCKS, NUM_DRAFTS)
    return draft_ids, draft_probs, target_probs


@pytest.mark.parametrize(
    ("expected", "chances"), [(expected_at_once, accepted_chances), (expected_by_token, accepted_chances_by_token)]
)
def test_expected_lengths_are_the_oracles(expected, chances):
    """The table shows another number than the expected accepted length."""
    draft_ids, draft_probs, target_probs = _blocks()
    lengths = expected(draft_ids, draft_probs, target_probs).tolist()
    for block in range(NUM_BLOCKS):
        along = [values[block].double().tolist() for values in (draft_probs, target_probs)]
        counts = chances(tuple(draft_ids[block].tolist()), *(lambda text, row=row: row[len(text)] for row in along))
        assert lengths[block] == pytest.approx(sum(k * chance for k, chance in enumerate(counts)), abs=1e-5)


def test_decoding_is_as_before():
    """The benchmark leaves its recorder in the loop, or changes what is accepted."""
    draft_ids, draft_probs, target_probs = _blocks()
    limits = torch.full((NUM_BLOCKS,), NUM_DRAFTS)
    results = []
    for is_recorded in (False, True):
        torch.manual_seed(5)
        with recorded() as blocks:
            rule = decoding.verify if is_recorded else verification.verify
            results.append(rule(draft_ids, draft_probs, target_probs, limits))
        assert len(blocks) == (NUM_BLOCKS if is_recorded else 0)
    assert decoding.verify is verification.verify
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
