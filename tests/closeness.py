"""What two ways to compute the same must agree in, on every processor."""

from __future__ import annotations

import torch
from torch import Tensor

# Each of some ten layers rounds an entry a few times, and norms and softmaxes amplify the difference tenfold. In bf16,
# which easily turns a choice of experts as well, that is nearly all that can be asked: compare in fp32 what matters.
_FACTORS = {torch.float32: 256.0, torch.bfloat16: 32.0}


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return how far two results are apart, as a part of the expected one's size.

    They are taken as a whole: an entry near zero says nothing of how large the numbers were that it is the sum of.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if torch.equal(actual, expected):
        return 0.0
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def assert_close_mostly(actual: Tensor, expected: Tensor, tolerance: float, largest: float = float("inf")) -> None:
    """Check that nine tokens' rows `(*, n)` of ten are as close as `tolerance`, and the others as close as `largest`.

    For what is rounded to 8 or 4 bits on its way: a difference in the last bit may fall to the other side of such a
    rounding, and moves the few tokens that read it. What is wrong with all of them is wrong with most.
    """
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs()
    size = 1 + expected.double().abs()
    is_close = (difference <= tolerance * size).all(-1)
    assert is_close.double().mean() >= 0.9, f"only {int(is_close.sum())} of {is_close.numel()} tokens are close"
    assert (difference <= largest * size).all(), f"a token is off by {difference.max():.3g}"


def assert_same_up_to_rounding(
    actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, factor: float | None = None
) -> None:
    """Check that two results of the same arithmetic in `dtype`, their own by default, differ by its rounding only.

    A product's sum is taken in an order that depends on the processor, the number of threads, the batch's width and
    where in memory its factors lie. `factor` is how many roundings may add up, by default those of a whole model.
    """
    dtype = expected.dtype if dtype is None else dtype
    allowed = (_FACTORS[dtype] if factor is None else factor) * torch.finfo(dtype).eps
    difference = relative_difference(actual, expected)
    # written so that NaN fails
    assert difference <= allowed, f"the difference is {difference:.3g} of the size, allowed is {allowed:.3g}"
