"""Top-p without sorting the vocabulary, for CPUs, where sorting takes longer than a small target's pass.

n distributions, V vocab, k of the highest scores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

# How many of the highest scores are looked at, fewer first. Plain choice: 64 hold most nuclei of a chat model, 1,024
# nearly all of a small model's at temperature 1, and a row that needs more is sorted.
_WIDTHS = (64, 1024)
# How far from `top_p` the mass above a token must be for the choice to be sure. Much more than sums in fp32 over the
# largest vocabularies lose, so that the tokens left are those that Transformers leaves.
_MARGIN = 1e-4


def top_p_scores(warper: TopPLogitsWarper, scores: Tensor) -> Tensor:
    """Return what `warper` makes of `scores` `(n, V)`, fp32: the same tokens are left.

    A token is left while those above it hold less than `top_p`. Rows in which that is a matter of rounding or of the
    order among equals are given to the warper itself, as is everything on an accelerator, which sorts quickly and
    would have to wait for the host.
    """
    if scores.device.type != "cpu":
        return _sorted(warper, scores)
    thresholds = scores.new_empty(len(scores), 1)
    left = torch.arange(len(scores))
    for width in _WIDTHS:
        if width >= scores.shape[-1] or not len(left):
            break
        rows = scores if len(left) == len(scores) else scores[left]
        lowest, is_sure = _lowest_left(warper, rows, width)
        thresholds[left[is_sure]] = lowest[is_sure]
        left = left[~is_sure]
    if len(left) == len(scores):
        return _sorted(warper, scores)
    result = scores.masked_fill(scores < thresholds, warper.filter_value)
    if len(left):
        result[left] = _sorted(warper, scores[left])
    return result


def _lowest_left(warper: TopPLogitsWarper, scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the lowest score `(n, 1)` that is left of each row, and whether that is sure, `(n,)`."""
    best = scores.topk(width + 1).values
    # a top-k in front leaves no others
    are_all = bool(best[:, -1].isneginf().all())
    probs = (best - (best if are_all else scores).logsumexp(-1, keepdim=True)).double().exp()
    above = probs.cumsum(-1) - probs
    counts = (above < warper.top_p).sum(-1, keepdim=True).clamp_min(warper.min_tokens_to_keep)
    last = (counts - 1).clamp_max(width - 1)
    lowest, next_one = best.gather(-1, last), best.gather(-1, last + 1)
    is_close = ((above - warper.top_p).abs() < _MARGIN).any(-1)
    is_sure = (counts <= width).squeeze(-1) & ~is_close & (next_one < lowest).squeeze(-1)
    # sums of infinite scores are no numbers, and compare as nothing
    return lowest, is_sure & above.isfinite().all(-1)


def _sorted(warper: TopPLogitsWarper, scores: Tensor) -> Tensor:
    # it looks at no prefix
    result: Tensor = warper(torch.empty(len(scores), 0, dtype=torch.long), scores)
    return result
