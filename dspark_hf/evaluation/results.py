"""The result of an evaluation: plain data, from the answers to the file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dspark_hf.evaluation.acceptance import Acceptance, summarize_acceptance
from dspark_hf.evaluation.measuring import PLAIN, SetMeasurement, all_schedulers, variant_name
from dspark_hf.evaluation.recording import Trial
from dspark_hf.evaluation.records import RoundRecord
from dspark_hf.evaluation.reliability import Reliability, measure_reliability
from dspark_hf.evaluation.sample import SampleAnswer
from dspark_hf.evaluation.settings import EvaluationSettings
from dspark_hf.evaluation.sweep import SweepPoint, sweep_thresholds
from dspark_hf.evaluation.throughput import Speed, summarize_speed
from dspark_hf.provenance import Provenance


@dataclass(frozen=True)
class DrafterResult:
    """One drafter on one prompt set at one temperature.

    Attributes:
        drafter: its name.
        acceptance: how far the target follows it.
        speeds: against plain `generate`, under the first scheduler asked for and with one row per call first.
        sweep: what a confidence threshold would have done; None without a confidence head.
        reliability: how far its confidence can be trusted; None without a confidence head.
        prompts: every prompt's counts.
    """

    drafter: str
    acceptance: Acceptance
    speeds: tuple[Speed, ...]
    sweep: tuple[SweepPoint, ...] | None
    reliability: Reliability | None
    prompts: tuple[PromptResult, ...]


@dataclass(frozen=True)
class PromptResult:
    """One prompt, every draft verified: tokens and seconds of every repeat, and the rounds and tokens behind `tau`."""

    num_plain_tokens: tuple[int, ...]
    num_tokens: tuple[int, ...]
    plain_seconds: tuple[float, ...]
    seconds: tuple[float, ...]
    num_rounds: int
    num_committed: int
    num_verified: int
    num_accepted: int


@dataclass(frozen=True)
class SetResult:
    """One prompt set at one temperature; `num_prompts` of `num_wanted` were measured."""

    name: str
    temperature: float
    num_prompts: int
    num_wanted: int
    drafters: tuple[DrafterResult, ...]

    @property
    def is_greedy(self) -> bool:
        """Whether every answer is the only one possible."""
        return self.temperature == 0


@dataclass(frozen=True)
class DrafterInfo:
    """A drafter: its name, its block size, whether it has a Markov head, a confidence head, and calibration."""

    name: str
    block_size: int
    has_markov_head: bool
    has_confidence_head: bool
    is_calibrated: bool


@dataclass(frozen=True)
class Evaluation:
    """Everything an evaluation measured.

    Attributes:
        target: name of the target.
        dtype: what target and drafters computed in.
        device: where.
        drafters: the drafter in question first.
        settings: how it was measured.
        provenance: hardware, versions, date, commit, command line.
        ended_by: what ended it early; None if it is complete.
        sets: the results, for every temperature and set.
        sample: one answer of the first drafter; None without a tokenizer.
    """

    target: str
    dtype: str
    device: str
    drafters: tuple[DrafterInfo, ...]
    settings: EvaluationSettings
    provenance: Provenance
    ended_by: str | None
    sets: tuple[SetResult, ...]
    sample: SampleAnswer | None = None

    @property
    def is_exact(self) -> bool:
        """Whether greedy answers must equal those of plain `generate`."""
        return self.dtype == "float32"

    @property
    def has_mismatch(self) -> bool:
        """Whether an answer differs that must not."""
        return self.is_exact and any(
            speed.num_identical is not None and speed.num_identical < speed.num_outputs
            for one_set in self.sets
            for drafter in one_set.drafters
            for speed in drafter.speeds
        )


def summarize_set(
    measurement: SetMeasurement, drafters: Sequence[str], num_wanted: int, settings: EvaluationSettings
) -> SetResult:
    """Return the result of a set of which at least one trial was measured."""
    return SetResult(
        name=measurement.name,
        temperature=measurement.temperature,
        num_prompts=len(measurement.trials),
        num_wanted=num_wanted,
        drafters=tuple(_summarize_drafter(name, measurement, settings) for name in drafters),
    )


def _summarize_drafter(name: str, measurement: SetMeasurement, settings: EvaluationSettings) -> DrafterResult:
    rounds = [_rounds(trial, name, is_greedy=measurement.is_greedy) for trial in measurement.trials]
    speeds = [
        summarize_speed(
            [trial[PLAIN] for trial in trials],
            [trial[variant_name(name, scheduler)] for trial in trials],
            scheduler=scheduler,
            batch_size=size,
            is_greedy=measurement.is_greedy,
        )
        for scheduler in all_schedulers(settings)
        for size, trials in ((1, measurement.trials), (settings.batch_size, measurement.batched_trials))
        if trials
    ]
    return DrafterResult(
        drafter=name,
        acceptance=summarize_acceptance(rounds),
        speeds=tuple(speeds),
        sweep=sweep_thresholds(rounds),
        reliability=measure_reliability(rounds),
        prompts=tuple(
            _summarize_prompt(trial, name, one) for trial, one in zip(measurement.trials, rounds, strict=True)
        ),
    )


def _rounds(trial: Trial, name: str, *, is_greedy: bool) -> list[RoundRecord]:
    # greedy answers repeat themselves; sampled ones are all new
    answers = trial[name][:1] if is_greedy else trial[name]
    rounds = [one for answer in answers for one in answer.rounds or ()]
    # a head that overflows on some text has said nothing there
    return [one if one.has_finite_confidence else replace(one, confidence=None) for one in rounds]


def _summarize_prompt(trial: Trial, name: str, rounds: Sequence[RoundRecord]) -> PromptResult:
    return PromptResult(
        num_plain_tokens=tuple(answer.num_tokens for answer in trial[PLAIN]),
        num_tokens=tuple(answer.num_tokens for answer in trial[name]),
        plain_seconds=tuple(answer.seconds for answer in trial[PLAIN]),
        seconds=tuple(answer.seconds for answer in trial[name]),
        num_rounds=len(rounds),
        num_committed=sum(one.num_committed for one in rounds),
        num_verified=sum(one.num_verified for one in rounds),
        num_accepted=sum(one.num_accepted for one in rounds),
    )


def to_json(evaluation: Evaluation) -> str:
    """Return the evaluation as JSON; what could not be measured is null."""
    fields: Mapping[str, Any] = {"is_complete": evaluation.ended_by is None, **asdict(evaluation)}
    return json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
