"""Calibrate a drafter's confidence on some prompts, and report what that does on others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from torch import Tensor

from dspark_hf.calibration.metrics import NUM_BINS, brier_score, expected_calibration_error, roc_auc
from dspark_hf.calibration.observations import Observations
from dspark_hf.calibration.sts import (
    MIN_REACHED,
    TEMPERATURE_GRID,
    StsFit,
    fit_sts,
    survival_probabilities,
    weighted_mean,
)
from dspark_hf.console import print_table


@dataclass(frozen=True)
class PositionScores:
    """How well one slot's probability foretells its outcome; NaN where that is undefined.

    Args:
        num_observations: blocks that count.
        ece: expected calibration error.
        brier: mean squared error.
        auc: area under the ROC curve; undefined if all outcomes are the same.
        mean_prediction: mean probability.
        mean_outcome: share of outcomes that came true.
    """

    num_observations: int
    ece: float
    brier: float
    auc: float
    mean_prediction: float
    mean_outcome: float


@dataclass(frozen=True)
class Scores:
    """Scores by slot.

    Args:
        survival: of the chance that drafts 1 to k are all accepted.
        conditional: of the chance that draft k is accepted, given that all before it are.
    """

    survival: tuple[PositionScores, ...]
    conditional: tuple[PositionScores, ...]

    @property
    def mean_ece(self) -> float:
        """Expected calibration error of the survival, averaged over slots and weighted by their observations."""
        return self._mean([slot.ece for slot in self.survival])

    @property
    def mean_brier(self) -> float:
        """Brier score of the survival, averaged likewise."""
        return self._mean([slot.brier for slot in self.survival])

    def _mean(self, values: Sequence[float]) -> float:
        return weighted_mean(values, [slot.num_observations for slot in self.survival])


@dataclass(frozen=True)
class SplitScores:
    """Scores on some of the prompts, `before` at temperature 1 and `after` at the fitted temperatures."""

    num_prompts: int
    num_blocks: int
    before: Scores
    after: Scores


@dataclass(frozen=True)
class CalibrationReport:
    """Fitted temperatures and what they do.

    Args:
        fit: the temperatures and how far the blocks support them.
        fitting: scores on the prompts of the fit.
        validation: scores on the prompts that had no part in it.
        num_bins: equal-width bins of the calibration error.
    """

    fit: StsFit
    fitting: SplitScores
    validation: SplitScores
    num_bins: int

    @property
    def temperatures(self) -> list[float]:
        """One temperature per slot, for `sts_temperatures`."""
        return list(self.fit.temperatures)

    @property
    def is_improvement(self) -> bool:
        """Whether the temperatures lower the mean calibration error on prompts that had no part in the fit.

        Not at the cost of the Brier score: then they only make the blocks look alike.
        """
        before, after = self.validation.before, self.validation.after
        return after.mean_ece < before.mean_ece and after.mean_brier <= before.mean_brier

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers should know, one sentence each."""
        notes = []
        for position, count in enumerate(self.fit.num_reached):
            if self.fit.is_copied[position]:
                notes.append(
                    f"Slot {position + 1} takes the temperature of the slot before it: only {count} blocks reach it."
                )
            elif self.fit.temperatures[position] in (TEMPERATURE_GRID[0], TEMPERATURE_GRID[-1]):
                notes.append(f"The temperature of slot {position + 1} lies at the end of the grid.")
        return notes

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON types; undefined scores are None."""
        return {
            "sts_temperatures": self.temperatures,
            "num_reached": list(self.fit.num_reached),
            "num_bins": self.num_bins,
            "objective": self.fit.objective,
            "mean_ece": self._means("mean_ece"),
            "mean_brier": self._means("mean_brier"),
            "is_improvement": self.is_improvement,
            "notes": self.notes,
            "fitting": _finite(asdict(self.fitting)),
            "validation": _finite(asdict(self.validation)),
        }

    def _means(self, name: str) -> dict[str, dict[str, float]]:
        splits = (("fitting", self.fitting), ("validation", self.validation))
        return {
            split: {"before": _finite(getattr(scores.before, name)), "after": _finite(getattr(scores.after, name))}
            for split, scores in splits
        }

    def print_tables(self, console: Console) -> None:
        """Print the scores on the validation prompts."""
        before, after = self.validation.before, self.validation.after
        for title, scores in (
            ("Drafts 1 to k all accepted (survival)", (before.survival, after.survival)),
            ("Draft k accepted, given those before it", (before.conditional, after.conditional)),
        ):
            headings = ("k", "T", "blocks", "seen", "believed", "ECE", "Brier", "AUC")
            print_table(console, title, headings, self._rows(*scores))
            console.print("pairs: at temperature 1, at T; on the prompts that were not fitted", "", style="dim")

    def _rows(self, before: Sequence[PositionScores], after: Sequence[PositionScores]) -> list[tuple[str, ...]]:
        return [
            (
                str(number),
                f"{temperature:.3f}",
                str(old.num_observations),
                _shown(old.mean_outcome),
                *(
                    f"{_shown(getattr(old, name))} {_shown(getattr(new, name))}"
                    for name in ("mean_prediction", "ece", "brier", "auc")
                ),
            )
            for number, (temperature, old, new) in enumerate(
                zip(self.temperatures, before, after, strict=True), start=1
            )
        ]


def calibrate(
    observations: Observations,
    *,
    objective: str = "ece",
    num_bins: int = NUM_BINS,
    min_reached: int = MIN_REACHED,
) -> CalibrationReport:
    """Fit temperatures on every other prompt and score them on the others.

    Args:
        observations: blocks of two prompts or more that the drafter was not trained on.
        objective: what the fit makes small, `"ece"` or `"brier"`; `fit_sts` says when to take which.
        num_bins: equal-width bins of the calibration error (20, as DeepSpec's evaluator).
        min_reached: a slot that fewer blocks reach takes the temperature of the slot before it.

    Raises:
        ValueError: if the objective is unknown, or there are blocks of one prompt only, or fewer than `min_reached`
            blocks to fit on.
    """
    if observations.num_prompts < 2:
        raise ValueError(
            f"`observations` must come from at least 2 prompts, got {observations.num_prompts}. One part of the "
            "prompts is fitted, the other tells whether it helped: use more prompts."
        )
    fitting, validation = observations.split_by_prompt()
    fit = fit_sts(fitting, objective=objective, num_bins=num_bins, min_reached=min_reached)
    return CalibrationReport(
        fit=fit,
        fitting=_score_split(fitting, fit.temperatures, num_bins),
        validation=_score_split(validation, fit.temperatures, num_bins),
        num_bins=num_bins,
    )


def _score_split(observations: Observations, temperatures: Sequence[float], num_bins: int) -> SplitScores:
    ones = [1.0] * observations.block_size
    return SplitScores(
        num_prompts=observations.num_prompts,
        num_blocks=len(observations),
        before=score(observations, ones, num_bins),
        after=score(observations, temperatures, num_bins),
    )


def score(observations: Observations, temperatures: Sequence[float], num_bins: int = NUM_BINS) -> Scores:
    """Return the scores of survival and confidence at the given temperatures, one per slot."""
    survival = survival_probabilities(observations.confidence_logits, temperatures)
    survival_scores, conditional_scores = [], []
    for position, temperature in enumerate(temperatures):
        accepted = observations.num_accepted > position
        observed, reached = observations.is_observed(position), observations.is_reached(position)
        confidence = (observations.confidence_logits[:, position] / temperature).sigmoid()
        survival_scores.append(_score_slot(survival[observed, position], accepted[observed], num_bins))
        conditional_scores.append(_score_slot(confidence[reached], accepted[reached], num_bins))
    return Scores(tuple(survival_scores), tuple(conditional_scores))


def _score_slot(predictions: Tensor, outcomes: Tensor, num_bins: int) -> PositionScores:
    return PositionScores(
        num_observations=len(predictions),
        ece=expected_calibration_error(predictions, outcomes, num_bins),
        brier=brier_score(predictions, outcomes),
        auc=roc_auc(predictions, outcomes),
        mean_prediction=predictions.double().mean().item(),
        mean_outcome=outcomes.double().mean().item(),
    )


def _finite(value: Any) -> Any:
    """Return `value` with None for every NaN: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
