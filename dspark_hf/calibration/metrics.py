"""How well probabilities foretell outcomes: calibration error, Brier score, ranking.

N predictions, M bins. Everything is computed on the CPU in fp64, whatever the predictions' device and dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# as DeepSpec's evaluator, so that errors can be compared with those of the released drafters
NUM_BINS = 20


@dataclass(frozen=True)
class ReliabilityBins:
    """Predictions in equal-width bins of [0, 1]; the last bin holds 1.

    `counts` `(M,)`, int64; `mean_predictions` and `mean_outcomes` `(M,)`, fp64, NaN in empty bins.
    """

    counts: Tensor
    mean_predictions: Tensor
    mean_outcomes: Tensor


def reliability_bins(predictions: Tensor, outcomes: Tensor, num_bins: int = NUM_BINS) -> ReliabilityBins:
    """Return predictions `(N,)` in [0, 1] and their outcomes `(N,)`, 0 or 1, averaged within bins of the prediction.

    Raises:
        ValueError: if the tensors do not belong together, a prediction is no probability, or there is no bin.
    """
    predictions, outcomes = _checked(predictions, outcomes)
    counts, prediction_sums, outcome_sums = _bin_sums(predictions, outcomes, num_bins)
    return ReliabilityBins(counts.long(), prediction_sums / counts, outcome_sums / counts)


def expected_calibration_error(predictions: Tensor, outcomes: Tensor, num_bins: int = NUM_BINS) -> float:
    """Return the mean gap between predictions and outcomes within bins, weighted by the bins' counts (ECE).

    Takes predictions `(N,)` in [0, 1] and their outcomes `(N,)`, 0 or 1. NaN without predictions.

    Raises:
        ValueError: if the tensors do not belong together, a prediction is no probability, or there is no bin.

    Example:

        >>> import torch
        >>> expected_calibration_error(torch.tensor([0.75, 0.75, 0.75, 0.75]), torch.tensor([1, 0, 1, 0]))
        0.25
    """
    predictions, outcomes = _checked(predictions, outcomes)
    _, prediction_sums, outcome_sums = _bin_sums(predictions, outcomes, num_bins)
    if len(predictions) == 0:
        return math.nan
    return (prediction_sums - outcome_sums).abs().sum().item() / len(predictions)


def brier_score(predictions: Tensor, outcomes: Tensor) -> float:
    """Return the mean squared difference of predictions `(N,)` and outcomes `(N,)`; NaN without predictions.

    Raises:
        ValueError: if the tensors do not belong together or a prediction is no probability.

    Example:

        >>> import torch
        >>> brier_score(torch.tensor([1.0, 0.5]), torch.tensor([1, 0]))
        0.125
    """
    predictions, outcomes = _checked(predictions, outcomes)
    return (predictions - outcomes).square().mean().item()


def roc_auc(predictions: Tensor, outcomes: Tensor) -> float:
    """Return the chance that an outcome of 1 was predicted higher than an outcome of 0, a tie counting half.

    Takes predictions `(N,)` in [0, 1] and their outcomes `(N,)`, 0 or 1. NaN if all outcomes are the same.

    Raises:
        ValueError: if the tensors do not belong together or a prediction is no probability.

    Example:

        >>> import torch
        >>> roc_auc(torch.tensor([0.9, 0.6, 0.6, 0.1]), torch.tensor([1, 1, 0, 0]))
        0.875
    """
    predictions, outcomes = _checked(predictions, outcomes)
    num_positive = outcomes.sum().item()
    num_negative = len(outcomes) - num_positive
    if num_positive == 0 or num_negative == 0:
        return math.nan
    _, places, counts = predictions.unique(return_inverse=True, return_counts=True)
    # equal predictions share the mean of their ranks
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[places]
    rank_sum = (ranks * outcomes).sum().item()
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def _bin_sums(predictions: Tensor, outcomes: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return every bin's count, sum of predictions and sum of outcomes, `(M,)` each, fp64."""
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1, got {num_bins}. {NUM_BINS} is the default.")
    places = (predictions * num_bins).long().clamp_max(num_bins - 1)
    columns = torch.stack([torch.ones_like(predictions), predictions, outcomes])
    sums = torch.zeros(3, num_bins, dtype=torch.float64).index_add_(1, places, columns)
    return sums[0], sums[1], sums[2]


def _checked(predictions: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    if predictions.ndim != 1 or predictions.shape != outcomes.shape:
        raise ValueError(
            f"`predictions` and `outcomes` must be two vectors of one length, got shapes "
            f"{tuple(predictions.shape)} and {tuple(outcomes.shape)}. Pick the observed entries with a mask."
        )
    # moved before the conversion: not every accelerator knows fp64
    predictions, outcomes = predictions.detach().cpu().double(), outcomes.detach().cpu().double()
    if not ((predictions >= 0) & (predictions <= 1)).all():
        raise ValueError(
            f"`predictions` must lie in [0, 1], got {predictions.min().item()} to {predictions.max().item()}. "
            "Apply the sigmoid to logits first."
        )
    return predictions, outcomes
