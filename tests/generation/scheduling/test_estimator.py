"""The chance of acceptance, learnt from margins."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dspark_hf.generation.scheduling.estimator import MAX_MARGIN, AcceptanceEstimator, top_margin
from tests.thinning import slow

INF = float("inf")


def _chance(bias: float, slope: float, margin: float) -> float:
    return 1 / (1 + math.exp(-(bias + slope * margin)))


def _teach(estimator: AcceptanceEstimator, bias: float, slope: float, num_rounds: int, draw: random.Random) -> None:
    """Let drafts be accepted by a logistic law, as many rounds of five drafts."""
    for _ in range(num_rounds):
        margins = [draw.uniform(0, 6) for _ in range(5)]
        num_accepted = 0
        while num_accepted < 5 and draw.random() < _chance(bias, slope, margins[num_accepted]):
            num_accepted += 1
        estimator.learn([margins], [5], [num_accepted])


def _auc(scores: list[float], fates: list[bool]) -> float:
    """Return how often an accepted draft scores higher than a rejected one."""
    good = [score for score, fate in zip(scores, fates, strict=True) if fate]
    bad = [score for score, fate in zip(scores, fates, strict=True) if not fate]
    pairs = [(high > low) + 0.5 * (high == low) for high in good for low in bad]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize(("bias", "slope"), [(-2.0, 1.0), slow(1.0, 0.3), slow(-0.5, 2.0)])
def test_a_known_law_is_found(bias, slope):
    """The estimate does not come near the law by which drafts are accepted."""
    margins = torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    estimates = []
    for seed in range(10):
        estimator = AcceptanceEstimator()
        _teach(estimator, bias, slope, 500, random.Random(seed))
        estimates.append(estimator.estimate(margins)[0])
    # each follows the latest few hundred drafts, and errs by chance; the mean is drawn to what is believed at first
    law = torch.tensor([_chance(bias, slope, margin) for margin in margins[0].tolist()])
    assert ((torch.stack(estimates) - law).abs() < 0.25).all()
    assert ((torch.stack(estimates).mean(0) - law).abs() < 0.12).all()


def test_a_new_law_is_followed():
    """What was learnt of another text stays for ever."""
    estimator, draw = AcceptanceEstimator(), random.Random(1)
    _teach(estimator, 2.0, 0.5, 500, draw)
    _teach(estimator, -2.0, 0.5, 1500, draw)
    assert abs(estimator.estimate(torch.tensor([[2.0]])).item() - _chance(-2.0, 0.5, 2.0)) < 0.1


def test_estimates_tell_good_drafts_from_bad_ones():
    """Estimates of accepted drafts are no higher than those of rejected ones."""
    estimator, draw = AcceptanceEstimator(), random.Random(2)
    _teach(estimator, -2.0, 1.0, 300, draw)
    margins = [draw.uniform(0, 6) for _ in range(400)]
    fates = [draw.random() < _chance(-2.0, 1.0, margin) for margin in margins]
    scores = estimator.estimate(torch.tensor([margins]))[0].tolist()
    assert _auc(scores, fates) > 0.8


def test_an_estimate_depends_on_its_own_margin():
    """A later draft, or another row, decides about an earlier one."""
    estimator = AcceptanceEstimator()
    _teach(estimator, -1.0, 1.0, 50, random.Random(3))
    margins = 5 * torch.rand(3, 4)
    changed = margins.clone()
    changed[1, 2] += 1.0
    is_changed = estimator.estimate(margins) != estimator.estimate(changed)
    assert is_changed.nonzero().tolist() == [[1, 2]]


def test_unobserved_drafts_teach_nothing():
    """Drafts behind a rejected one, or those that were not verified, count as rejected or as accepted."""
    one, other = AcceptanceEstimator(), AcceptanceEstimator()
    # the fate of the first two is known; the third stands behind a rejection, the fourth was not verified
    one.learn([[1.0, 2.0, 0.1, 0.2], [3.0, 4.0, 5.0, 6.0]], [3, 0], [1, 0])
    other.learn([[1.0, 2.0, 9.0, 9.0], [0.0, 0.0, 0.0, 0.0]], [3, 0], [1, 0])
    assert (one.bias, one.slope) == (other.bias, other.slope)
    fresh = AcceptanceEstimator()
    fresh.learn([[1.0, 2.0]], [0], [0])
    assert (fresh.bias, fresh.slope) == (AcceptanceEstimator().bias, AcceptanceEstimator().slope)


@pytest.mark.parametrize("is_right", [False, True])
def test_one_sided_outcomes_stay_finite(is_right):
    """A drafter that is always right, or never, drives the fit to infinity."""
    estimator = AcceptanceEstimator()
    for _ in range(3000):
        estimator.learn([[0.0], [12.0], [3.0]], [1, 1, 1], [int(is_right)] * 3)
    margins = torch.tensor([[0.0, 3.0, 12.0]])
    estimates = estimator.estimate(margins)
    assert estimates.isfinite().all()
    assert (estimates > 0.9).all() if is_right else (estimates < 0.2).all()


def test_a_larger_margin_never_speaks_against_a_draft():
    """A run of odd outcomes turns the order of drafts around."""
    estimator = AcceptanceEstimator()
    for _ in range(200):
        estimator.learn([[6.0]], [1], [0])
        estimator.learn([[0.0]], [1], [1])
    low, high = estimator.estimate(torch.tensor([[0.0, 6.0]]))[0].tolist()
    assert low <= high


@pytest.mark.parametrize(
    ("logits", "margin"),
    [
        ([1.0, 4.0, 2.5], 1.5),
        ([3.0, 3.0, 1.0], 0.0),
        # only one token can be drafted, none, or there is only one
        ([-INF, 2.0, -INF], MAX_MARGIN),
        ([-INF, -INF, -INF], 0.0),
        ([7.0], MAX_MARGIN),
        ([100.0, 0.0], MAX_MARGIN),
        ([INF, 0.0], MAX_MARGIN),
        ([INF, INF], 0.0),
    ],
)
def test_margin(logits, margin):
    """A margin is not the difference of the two best logits, or no number at all."""
    assert top_margin(torch.tensor([logits])).tolist() == [margin]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_margin_of_half_precision_logits(dtype):
    """Margins are rounded once more than the logits."""
    logits = torch.randn(5, 9).to(dtype)
    best = logits.float().sort(-1, descending=True).values
    margins = top_margin(logits)
    assert margins.dtype == torch.float32
    assert torch.equal(margins, best[:, 0] - best[:, 1])
