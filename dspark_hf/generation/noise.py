"""Random numbers that follow from a key, and not from how many were drawn before.

b rows, W positions, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from struct import pack, unpack

import torch
from torch import Tensor

# odd numbers whose products mix bits well, as signed integers; the first spreads consecutive ids
_SPREAD, _FIRST, _SECOND = (value - 2**32 for value in (0x9E3779B1, 0xA812D533, 0xC2B2AE35))
_SCALE = 2.0**-31


class KeyedNoise:
    """Gumbel noise of every token at every place of a text: a function of seed, row, place and token.

    The token with the largest sum of score and noise is drawn with its softmax's chance, whatever else was drawn
    before. Two distributions that are shown the same noise mostly draw the same token, the more so the closer they
    are.

    Args:
        seed: what all follows from; None draws one from torch's global generator.

    Example:

        >>> noise = KeyedNoise(seed=1)
        >>> scores = torch.zeros(1, 2, 5)
        >>> both = noise.add_to(scores, [0], [7])
        >>> torch.equal(both[:, 1:], noise.add_to(scores[:, 1:], [0], [8]))
        True
    """

    def __init__(self, seed: int | None = None):
        self._seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed

    def add_to(
        self, scores: Tensor, rows: Sequence[int], starts: Sequence[int], token_ids: Tensor | None = None
    ) -> Tensor:
        """Return `scores` `(b, W, n)` with noise, fp32: row r at the places from `starts[r]` on.

        `token_ids` `(n,)` or `(b, n)` say which tokens these are; None for all in their order.
        """
        width = scores.shape[1]
        places = [(row, start + w) for row, start in zip(rows, starts, strict=True) for w in range(width)]
        keys = torch.tensor([self._key(*place) for place in places], dtype=torch.int32, device=scores.device)
        if token_ids is None:
            token_ids = torch.arange(scores.shape[-1], device=scores.device)
        tokens = token_ids.to(device=scores.device, dtype=torch.int32) * _SPREAD
        # (n,) or (b, 1, n)
        tokens = tokens if tokens.ndim == 1 else tokens[:, None]
        return scores.float() + _gumbel(tokens, keys.view(len(rows), width, 2))

    def _key(self, row: int, place: int) -> tuple[int, int]:
        first, second = unpack("<ii", blake2b(pack("<Qqq", self._seed, row, place), digest_size=8).digest())
        return first, second


def _gumbel(tokens: Tensor, keys: Tensor) -> Tensor:
    """Return noise `(b, W, n)` for mixed ids and keys `(b, W, 2)`; integers wrap around, on every device alike."""
    bits = tokens + keys[..., :1]
    bits.bitwise_xor_(_shifted(bits, 16)).mul_(_FIRST)
    # here too, or one place's noise would be another's, in another order of the tokens
    bits.add_(keys[..., 1:])
    bits.bitwise_xor_(_shifted(bits, 15)).mul_(_SECOND)
    bits.bitwise_xor_(_shifted(bits, 16)).bitwise_and_(2**31 - 1)
    # small chances keep their digits: a rare token wins with a number close to zero
    return bits.float().add_(0.5).mul_(_SCALE).neg_().log1p_().neg_().log_().neg_()


def _shifted(bits: Tensor, count: int) -> Tensor:
    # the sign must not be drawn in from above
    return (bits >> count).bitwise_and_(2 ** (32 - count) - 1)
