"""Sequential Temperature Scaling finds the miscalibration, and changes nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from dspark_hf.calibration.metrics import brier_score, expected_calibration_error, roc_auc
from dspark_hf.calibration.observations import Observations
from dspark_hf.calibration.report import score
from dspark_hf.calibration.sts import OBJECTIVES, TEMPERATURE_GRID, fit_sts, survival_probabilities
from tests.calibration.synthetic import synthetic_observations
from tests.reference.calibration import sequential_temperatures
from tests.thinning import slow

GRID = (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(4))
def test_fit_equals_the_slow_one(seed, objective):
    """The search is not the paper's: left to right, on the cumulative product, over observed blocks only."""
    generator = torch.Generator().manual_seed(seed)
    truth = (0.5 + torch.rand(3, generator=generator) * 2).tolist()
    observations = synthetic_observations(120, truth, share_cut=0.3, seed=seed)
    fit = fit_sts(observations, objective=objective, grid=GRID, num_bins=10, min_reached=1)
    assert list(fit.temperatures) == sequential_temperatures(
        observations.confidence_logits.tolist(),
        observations.num_accepted.tolist(),
        observations.num_observed.tolist(),
        GRID,
        10,
        objective=objective,
    )


@pytest.mark.parametrize(
    ("objective", "tolerance"),
    # the calibration error is flat around its minimum, and every slot inherits the error of those before it
    [slow("ece", 0.35), ("brier", 0.1)],
)
def test_known_temperatures_are_found(objective, tolerance):
    """A drafter that is over-confident in a known way is not put right, or its survival does not get truer."""
    truth = [2.0, 1.5, 0.7]
    fit = fit_sts(synthetic_observations(40_000, truth), objective=objective)
    for found, wanted in zip(fit.temperatures, truth, strict=True):
        assert abs(math.log(found / wanted)) < tolerance
    held_out = synthetic_observations(40_000, truth, seed=1)
    before, after = score(held_out, [1.0] * 3), score(held_out, fit.temperatures)
    assert after.mean_ece < before.mean_ece / 3
    assert after.mean_brier < before.mean_brier


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 6))])
def test_fitted_blocks_never_get_worse(seed, objective):
    """Temperatures are saved that do harm on the very blocks they were fitted to."""
    observations = synthetic_observations(150, [1.3, 1.0, 0.9, 1.1], share_cut=0.2, seed=seed)
    temperatures = fit_sts(observations, objective=objective, min_reached=20).temperatures
    before, after = score(observations, [1.0] * 4), score(observations, temperatures)
    if objective == "ece":
        assert after.mean_ece <= before.mean_ece
    else:
        assert after.mean_brier <= before.mean_brier
    # slot by slot, with the slots before it as they are
    measure = expected_calibration_error if objective == "ece" else brier_score
    for position in range(4):
        mask = observations.is_observed(position)
        outcomes = observations.num_accepted[mask] > position
        fitted, untouched = (
            survival_probabilities(
                observations.confidence_logits[mask], [*temperatures[:position], last, *temperatures[position + 1 :]]
            )[:, position]
            for last in (temperatures[position], 1.0)
        )
        if not fit_sts(observations, objective=objective, min_reached=20).is_copied[position]:
            assert measure(fitted, outcomes) <= measure(untouched, outcomes) + 1e-9


def test_order_within_a_slot_stays():
    """Calibration changes which of two blocks is believed in more."""
    observations = synthetic_observations(2000, [2.0, 0.5])
    fit = fit_sts(observations)
    for position, temperature in enumerate(fit.temperatures):
        logits = observations.confidence_logits[:, position]
        assert torch.equal(logits.argsort(stable=True), (logits / temperature).sigmoid().argsort(stable=True))
    before, after = score(observations, [1.0, 1.0]), score(observations, fit.temperatures)
    for old, new in zip(before.conditional, after.conditional, strict=True):
        assert new.auc == pytest.approx(old.auc, abs=1e-12)


def test_a_calibrated_drafter_is_left_alone():
    """Among temperatures that are equally good, one far from 1 is taken."""
    # logits of 0 are one half at any temperature
    observations = Observations(
        torch.zeros(100, 2).double(), torch.arange(100) % 2, torch.full((100,), 2), torch.arange(100)
    )
    assert fit_sts(observations).temperatures == (1.0, 1.0)


def test_the_grid_is_the_documented_one():
    """Temperatures lie elsewhere than documented, or 1, which changes nothing, is not among them."""
    assert len(TEMPERATURE_GRID) == 201
    assert (TEMPERATURE_GRID[0], TEMPERATURE_GRID[100], TEMPERATURE_GRID[-1]) == (0.1, 1.0, 10.0)
    assert sorted(TEMPERATURE_GRID) == list(TEMPERATURE_GRID)


def test_calibration_error_alone_may_make_blocks_alike():
    """The documented difference between the objectives is none: then one of them could go."""
    # believed 0.5 and 0.88, true 1 in 4 and 3 in 4: at a high temperature both land in one bin, right on average
    block = torch.arange(400)
    is_likely = block % 2 == 1
    accepted = torch.where(is_likely, block % 8 != 1, block % 8 == 0)
    logits = torch.where(is_likely, 2.0, 0.0)[:, None].double()
    observations = Observations(logits, accepted.long(), torch.ones(400).long(), block)
    by_error, by_brier = (fit_sts(observations, objective=objective) for objective in OBJECTIVES)
    assert by_error.temperatures[0] > 9
    assert by_brier.temperatures[0] == pytest.approx(2 / math.log(3), rel=0.02)
    before, by_error_after = score(observations, [1.0]), score(observations, by_error.temperatures)
    assert by_error_after.mean_ece < score(observations, by_brier.temperatures).mean_ece
    assert by_error_after.mean_brier > before.mean_brier


def test_rarely_reached_slots_copy_the_one_before():
    """A temperature is fitted to the noise of a handful of blocks, and nobody is told."""
    observations = synthetic_observations(400, [2.0, 2.0, 2.0], mean_logit=-1.0)
    reached = [int((observations.num_accepted >= position).sum()) for position in range(3)]
    fit = fit_sts(observations, min_reached=reached[2] + 1)
    assert fit.num_reached == tuple(reached)
    assert fit.is_copied == (False, False, True)
    assert fit.temperatures[2] == fit.temperatures[1] != 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (0.5, 2.0)}, "`grid` must hold 1.0"),
        ({"grid": (-1.0, 1.0)}, "`grid` must hold 1.0"),
        ({"min_reached": 101}, "at least 101 blocks .* got 100. Use more prompts"),
        ({"objective": "nll"}, "`objective` must be one of .* got 'nll'"),
    ],
)
def test_impossible_fits_are_refused(options, message):
    """A fit that means nothing looks like one that does."""
    with pytest.raises(ValueError, match=message):
        fit_sts(synthetic_observations(100, [1.0]), **options)


def test_ranking_of_survival_is_reported():
    """Survival's AUC is computed from something else than the cumulative product."""
    observations = synthetic_observations(300, [1.5, 1.0])
    survival = survival_probabilities(observations.confidence_logits, [1.2, 0.8])[:, 1]
    expected = roc_auc(survival, observations.num_accepted > 1)
    assert score(observations, [1.2, 0.8]).survival[1].auc == expected
