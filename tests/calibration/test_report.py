"""The report tells the truth about prompts that had no part in the fit."""

from __future__ import annotations

import json
import math

import pytest
from rich.console import Console

from dspark_hf.calibration.report import calibrate, score
from tests.calibration.synthetic import synthetic_observations


def test_validation_prompts_have_no_part_in_the_fit():
    """The improvement is measured on what was fitted: it always looks good."""
    observations = synthetic_observations(4000, [2.0, 1.5], num_prompts=7)
    fitting, validation = observations.split_by_prompt()
    report = calibrate(observations)
    assert (report.fitting.num_prompts, report.validation.num_prompts) == (4, 3)
    assert report.fitting.num_blocks + report.validation.num_blocks == len(observations)
    assert report.fitting.after == score(fitting, report.temperatures)
    assert report.validation.before == score(validation, [1.0, 1.0])
    assert report.validation.after == score(validation, report.temperatures)
    # other validation prompts change nothing about the temperatures
    validation.confidence_logits.neg_()
    assert calibrate(observations.select(observations.prompt_ids % 2 == 0)).temperatures != report.temperatures
    assert report.is_improvement


def test_conditional_scores_count_reached_blocks_only():
    """Drafts behind a rejected one are held against the confidence of their own slot."""
    observations = synthetic_observations(1000, [1.0, 1.0], mean_logit=0.0)
    first, second = score(observations, [1.0, 1.0]).conditional
    num_reached = int((observations.num_accepted >= 1).sum())
    assert (first.num_observations, second.num_observations) == (1000, num_reached)
    assert second.mean_outcome == pytest.approx(int((observations.num_accepted == 2).sum()) / num_reached)
    # logits tell the true chance here
    assert second.mean_prediction == pytest.approx(second.mean_outcome, abs=0.06)


def test_a_fit_that_costs_sharpness_is_no_improvement():
    """Temperatures that make all blocks look alike are praised for their calibration error."""
    report = calibrate(synthetic_observations(4000, [2.0]))
    before, after = report.validation.before, report.validation.after
    assert report.is_improvement == (after.mean_ece < before.mean_ece and after.mean_brier <= before.mean_brier)
    swapped = type(report)(
        fit=report.fit,
        fitting=report.fitting,
        validation=type(report.validation)(1, 1, before=after, after=before),
        num_bins=report.num_bins,
    )
    assert report.is_improvement
    assert not swapped.is_improvement


def test_json_knows_no_nan():
    """Other programs cannot read the report, or it lacks what they look for."""
    # every draft is accepted: no AUC; slot 3 is never observed: no score at all
    observations = synthetic_observations(200, [1.0, 1.0, 1.0], mean_logit=40.0)
    observations.num_observed.clamp_(max=2)
    observations.num_accepted.clamp_(max=2)
    report = calibrate(observations, min_reached=20)
    fields = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert fields["sts_temperatures"] == report.temperatures
    assert fields["mean_ece"]["validation"]["after"] == pytest.approx(report.validation.after.mean_ece)
    slots = fields["validation"]["before"]["survival"]
    assert len(slots) == 3
    assert slots[0]["auc"] is None
    assert slots[2] == {
        "num_observations": 0,
        **dict.fromkeys(("ece", "brier", "auc", "mean_prediction", "mean_outcome")),
    }
    assert math.isnan(report.validation.before.survival[2].ece)


def test_notes_tell_which_temperatures_are_copied():
    """A reader takes a copied temperature, or one at the grid's end, for a fitted one."""
    observations = synthetic_observations(2000, [40.0, 2.0, 2.0], mean_logit=-1.0, num_prompts=4)
    report = calibrate(observations, objective="brier", min_reached=150)
    assert report.fit.is_copied == (False, False, True)
    assert any(note.startswith("Slot 3 takes the temperature of the slot before it") for note in report.notes)
    assert "The temperature of slot 1 lies at the end of the grid." in report.notes


def test_tables_fit_a_terminal():
    """The scores are cut off where a terminal is 80 columns wide, or a table lacks a slot."""
    console = Console(width=80, record=True, no_color=True)
    calibrate(synthetic_observations(600, [1.5] * 7)).print_tables(console)
    text = console.export_text()
    assert "…" not in text
    assert sum(line.strip().startswith("7 ") for line in text.splitlines()) == 2
    assert max(len(line) for line in text.splitlines()) <= 80


def test_one_prompt_cannot_be_split():
    """One prompt is fitted and nothing is left to tell whether that helped."""
    with pytest.raises(ValueError, match="must come from at least 2 prompts, got 1"):
        calibrate(synthetic_observations(200, [1.0], num_prompts=1))
