"""Calibration error, Brier score and AUC are what their definitions say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_hf.calibration.metrics import brier_score, expected_calibration_error, reliability_bins, roc_auc
from tests.reference import calibration as oracle

PAIRS = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0])), st.booleans()),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(pairs=PAIRS, num_bins=st.integers(1, 25))
def test_metrics_equal_their_definitions(pairs, num_bins):
    """A metric is wrong: at the edges of bins, for ties, or in its weights."""
    values, came = zip(*pairs, strict=True)
    predictions, outcomes = torch.tensor(values, dtype=torch.float64), torch.tensor(came)
    error = expected_calibration_error(predictions, outcomes, num_bins)
    assert error == pytest.approx(oracle.calibration_error(values, came, num_bins), abs=1e-9)
    assert brier_score(predictions, outcomes) == pytest.approx(oracle.brier(values, came), abs=1e-9)
    if len(set(came)) == 2:
        assert roc_auc(predictions, outcomes) == pytest.approx(oracle.auc(values, came), abs=1e-9)
    else:
        assert math.isnan(roc_auc(predictions, outcomes))


def test_auc_equals_the_rank_test_of_scipy():
    """The ranking is wrong on many predictions with many ties."""
    # seconds, which no other test needs
    from scipy.stats import mannwhitneyu

    predictions, outcomes = (torch.rand(2000) * 30).round() / 30, torch.rand(2000) < 0.4
    statistic = mannwhitneyu(predictions[outcomes].numpy(), predictions[~outcomes].numpy()).statistic
    expected = statistic / (int(outcomes.sum()) * int((~outcomes).sum()))
    assert roc_auc(predictions, outcomes) == pytest.approx(expected, abs=1e-12)


def test_perfect_and_hopeless_rankings():
    """A drafter that knows everything looks like one that knows nothing."""
    predictions, outcomes = torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([0, 0, 1, 1])
    assert roc_auc(predictions, outcomes) == 1
    assert roc_auc(1 - predictions, outcomes) == 0
    assert roc_auc(torch.full((4,), 0.3), outcomes) == 0.5


def test_bins_hold_every_prediction():
    """A reliability diagram loses blocks, or puts a bin's average elsewhere."""
    bins = reliability_bins(torch.tensor([0.0, 0.24, 0.25, 1.0]), torch.tensor([0, 1, 1, 1]), num_bins=4)
    assert bins.counts.tolist() == [2, 1, 0, 1]
    torch.testing.assert_close(bins.mean_predictions[[0, 1, 3]], torch.tensor([0.12, 0.25, 1.0]).double())
    assert bins.mean_outcomes[[0, 1, 3]].tolist() == [0.5, 1.0, 1.0]
    assert bins.mean_outcomes[2].isnan()


def test_bf16_predictions_are_averaged_exactly():
    """Sums in the predictions' own dtype lose what a metric is about."""
    predictions = torch.full((5000,), 0.75, dtype=torch.bfloat16)
    outcomes = torch.arange(5000) % 4 != 0
    assert expected_calibration_error(predictions, outcomes) == pytest.approx(0, abs=1e-12)


def test_nothing_observed_is_no_number():
    """A slot that was never observed looks perfectly calibrated."""
    nothing = torch.empty(0)
    for metric in (expected_calibration_error, brier_score, roc_auc):
        assert math.isnan(metric(nothing, nothing))


@pytest.mark.parametrize(
    ("predictions", "outcomes", "message"),
    [
        (torch.rand(3), torch.rand(2), "two vectors of one length"),
        (torch.rand(3, 1), torch.rand(3, 1), "two vectors of one length"),
        (torch.tensor([2.0]), torch.tensor([1]), r"must lie in \[0, 1\], got 2.0"),
        (torch.tensor([float("nan")]), torch.tensor([1]), r"must lie in \[0, 1\], got nan"),
    ],
)
def test_what_is_no_probability_is_refused(predictions, outcomes, message):
    """Logits, or predictions of other drafts, give a number that means nothing."""
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(predictions, outcomes)
    with pytest.raises(ValueError, match="`num_bins` must be at least 1, got 0"):
        expected_calibration_error(torch.rand(1), torch.ones(1), 0)
