"""One token of scores or of a distribution."""

from __future__ import annotations

import pytest
import torch

from dspark_hf.generation.drawing import most_likely


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 5), (3, 64), (1, 8, 8192), (4, 49152), (1, 100_000), (7, 1)])
def test_ties_go_to_the_token_that_plain_generate_takes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Half of bf16's best tokens tie with another: a text would part from plain's at every one of them."""
    for num_levels in (1, 2, 5, 1000):
        scores = torch.randint(0, num_levels, shape).to(dtype)
        for given in (scores, scores.transpose(0, -1).contiguous().transpose(0, -1)):
            assert torch.equal(most_likely(given), given.argmax(-1))
        scores[torch.rand(shape) < 0.4] = float("-inf")
        assert torch.equal(most_likely(scores), scores.argmax(-1))
        scores[torch.rand(shape) < 0.05] = float("nan")
        assert torch.equal(most_likely(scores), scores.argmax(-1))
