"""Top-p by the highest scores alone: the tokens that Transformers leaves, without a sort where few tokens matter."""

import pytest
import torch
from transformers import TopPLogitsWarper

from dspark_hf.generation.call import nucleus
from dspark_hf.generation.call.nucleus import top_p_scores

VOCAB_SIZE = 5000


def _by_sorting(warper, scores):
    return warper(torch.empty(len(scores), 0, dtype=torch.long), scores)


def _peaked(num_rows: int, num_likely: int, gain: float) -> torch.Tensor:
    """Noise with some tokens above it, in places of their own."""
    scores = torch.randn(num_rows, VOCAB_SIZE)
    for row in scores:
        row[torch.randperm(VOCAB_SIZE)[:num_likely]] += torch.linspace(gain, 3 * gain, num_likely)
    return scores


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.8, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("min_tokens", [1, 2, 70])
def test_same_tokens_are_left(top_p, min_tokens):
    """Tokens stay or go otherwise than with Transformers' own, in narrow, wide and flat distributions."""
    torch.manual_seed(0)
    scores = torch.cat([_peaked(40, 5, 4.0), _peaked(40, 40, 2.0), _peaked(20, 300, 1.0), torch.randn(5, VOCAB_SIZE)])
    # what a top-k in front leaves
    cut = scores.masked_fill(scores < scores.topk(50).values[:, -1:], float("-inf"))
    warper = TopPLogitsWarper(top_p, min_tokens_to_keep=min_tokens)
    for given in (scores, cut):
        before = given.clone()
        assert torch.equal(top_p_scores(warper, given), _by_sorting(warper, given))
        assert torch.equal(given, before)


def test_doubtful_rows_are_sorted():
    """Equals, masses a rounding away from the share, and rows that are no distribution are decided otherwise."""
    equal = torch.full((1, VOCAB_SIZE), -20.0)
    equal[0, 10:20] = 0.0
    near = torch.full((1, VOCAB_SIZE), -40.0)
    # nine tenths and a little, or a little less: fp32 decides
    near[0, [7, 9]] = torch.tensor([0.9 + 1e-7, 0.1 - 1e-7]).log()
    invalid = torch.randn(3, VOCAB_SIZE)
    invalid[0, 3], invalid[1, 4], invalid[2] = float("nan"), float("inf"), float("-inf")
    few = torch.randn(2, 8)
    warper = TopPLogitsWarper(0.9)
    for scores in (equal, near, invalid, few):
        torch.testing.assert_close(
            top_p_scores(warper, scores), _by_sorting(warper, scores), equal_nan=True, atol=0, rtol=0
        )


def test_other_values_and_rows_that_are_sorted_beside_others():
    """A filter value of the user's is lost, or a row that is sorted takes another one's place."""
    torch.manual_seed(1)
    scores = torch.stack(
        [torch.randn(VOCAB_SIZE), _peaked(1, 3, 5.0)[0], torch.randn(VOCAB_SIZE), 9 * torch.randn(VOCAB_SIZE)]
    )
    warper = TopPLogitsWarper(0.9, filter_value=-7.0)
    assert torch.equal(top_p_scores(warper, scores), _by_sorting(warper, scores))


def test_narrow_distributions_are_not_sorted(monkeypatch):
    """The vocabulary is sorted although a few tokens decide, which takes as long as a small target's pass."""
    torch.manual_seed(2)
    narrow, middle = _peaked(6, 5, 8.0), _peaked(6, 200, 3.0)
    wide = torch.randn(2, VOCAB_SIZE)
    sorted_rows: list[int] = []
    real = nucleus._sorted

    def counted(warper, scores):
        sorted_rows.append(len(scores))
        return real(warper, scores)

    monkeypatch.setattr(nucleus, "_sorted", counted)
    warper = TopPLogitsWarper(0.9)
    top_p_scores(warper, torch.cat([narrow, middle]))
    assert not sorted_rows
    top_p_scores(warper, torch.cat([narrow, wide]))
    assert sorted_rows == [2]
