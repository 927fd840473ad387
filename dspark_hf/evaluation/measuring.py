"""Answer every prompt plain and with every drafter, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dspark_hf.evaluation.recording import Recording, Trial
from dspark_hf.evaluation.records import Answer, round_records
from dspark_hf.evaluation.settings import EvaluationSettings
from dspark_hf.generation.scheduling import FixedScheduler
from dspark_hf.generation.targets.adapter import TargetAdapter, input_device
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.prompts import pad_left

PLAIN = "plain"
# every draft is verified: only then is known what a threshold would have done
WHOLE_BLOCKS = FixedScheduler.name
_WARM_UP_TOKENS = 8


@dataclass
class SetMeasurement:
    """The answers to one prompt file at one temperature; whole trials only, whenever one looks.

    `trials` were measured row by row, `batched_trials` with `batch_size` rows per call.
    """

    name: str
    temperature: float
    trials: list[Trial] = field(default_factory=list)
    batched_trials: list[Trial] = field(default_factory=list)

    @property
    def is_greedy(self) -> bool:
        """Whether every answer is the only one possible."""
        return self.temperature == 0


class Measuring:
    """A run over prompt sets that can end at any time without losing whole trials.

    Args:
        target: the model that answers.
        drafters: who assists, by name.
        sets: every set's prompts, token ids `(1, T)` each.
        settings: how to measure.
        recording: where trials are written as they come, and looked for first; None for nowhere.
    """

    def __init__(
        self,
        target: Any,
        drafters: Mapping[str, DSparkAssistantModel],
        sets: Mapping[str, Sequence[Tensor]],
        settings: EvaluationSettings,
        recording: Recording | None = None,
    ):
        self._recording = recording
        self._target = target
        self._drafters = drafters
        self._variants: dict[str, tuple[DSparkAssistantModel, str] | None] = {PLAIN: None}
        for name, drafter in drafters.items():
            for scheduler in all_schedulers(settings):
                self._variants[variant_name(name, scheduler)] = drafter, scheduler
        self._sets = sets
        self._settings = settings
        self.measurements = [
            SetMeasurement(name, temperature) for temperature in settings.temperatures for name in sets
        ]

    def run(self, advance: Callable[[str], None]) -> None:
        """Measure everything; `advance` is called after every trial with the name of its set.

        Raises:
            ValueError: before anything is measured, if a drafter was not made for the target, or its confidence is no
                number.
        """
        self._check_drafters()
        self._warm_up()
        for measurement in self.measurements:
            prompts = self._sets[measurement.name]
            for index, token_ids in enumerate(prompts):
                measurement.trials.append(self._known_trial([token_ids], measurement, index, is_batch=False))
                advance(measurement.name)
            for index, batch in enumerate(self._batches(prompts)):
                measurement.batched_trials.append(self._known_trial(batch, measurement, index, is_batch=True))
                advance(measurement.name)

    def _batches(self, prompts: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        size = self._settings.batch_size
        return [] if size == 1 else [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def _check_drafters(self) -> None:
        # Transformers would complain of the tokenizers, and see nothing else that does not fit
        for drafter in self._drafters.values():
            drafter.check_target(TargetAdapter(self._target, drafter.target_layer_ids))

    def _warm_up(self) -> None:
        token_ids = next(iter(self._sets.values()))[0]
        for variant in self._variants:
            answer = self._answer([token_ids], variant, 0.0, seed=0, max_new_tokens=_WARM_UP_TOKENS)
            if not all(one.has_finite_confidence for one in answer.rounds or ()):
                raise ValueError(
                    f"`--drafter` and `--baseline` must have a confidence in [0, 1], got NaN from {variant}. Its "
                    "weights are damaged: fetch or train it anew."
                )

    def _known_trial(
        self, prompts: Sequence[Tensor], measurement: SetMeasurement, index: int, *, is_batch: bool
    ) -> Trial:
        key = (measurement.name, measurement.temperature, is_batch, index)
        trial = None if self._recording is None else self._recording.get(key)
        if trial is None:
            trial = self._trial(prompts, measurement.temperature, index)
            if self._recording is not None:
                self._recording.add(key, trial)
        return trial

    def _trial(self, prompts: Sequence[Tensor], temperature: float, index: int) -> Trial:
        variants = list(self._variants)
        trial: Trial = {variant: [] for variant in variants}
        for repeat in range(self._settings.repeats):
            number = index * self._settings.repeats + repeat
            # another variant goes first each time
            first = number % len(variants)
            for variant in [*variants[first:], *variants[:first]]:
                trial[variant].append(self._answer(prompts, variant, temperature, seed=self._settings.seed + number))
        return trial

    def _answer(
        self,
        prompts: Sequence[Tensor],
        variant: str,
        temperature: float,
        *,
        seed: int,
        max_new_tokens: int | None = None,
    ) -> Answer:
        chosen = self._variants[variant]
        inputs = pad_left([token_ids[0] for token_ids in prompts], input_device(self._target))
        options = {
            "max_new_tokens": max_new_tokens or self._settings.max_new_tokens,
            **_sampling_options(temperature),
            **({} if chosen is None else self._assistance(*chosen)),
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            start = perf_counter()
            output = self._target.generate(**inputs, **options)
            # on an accelerator this waits for the last token
            new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
            seconds = perf_counter() - start
        statistics = None
        if chosen is not None and chosen[1] == WHOLE_BLOCKS and len(prompts) == 1:
            statistics = chosen[0].last_statistics
        ends = self._target.generation_config.eos_token_id
        return Answer(
            token_ids=tuple(until_end(row, ends) for row in new_tokens),
            seconds=seconds,
            rounds=None if statistics is None else round_records(statistics),
        )

    def _assistance(self, drafter: DSparkAssistantModel, scheduler: str) -> dict[str, Any]:
        options: dict[str, Any] = {"assistant_model": drafter, "scheduler": scheduler}
        if scheduler == WHOLE_BLOCKS:
            # whatever the target's generation configuration prefers
            options["assistant_confidence_threshold"] = 0.0
            # what is looked up says nothing of the drafter
            options["drafts"] = "model"
        if self._settings.num_drafts is not None:
            options["num_assistant_tokens"] = self._settings.num_drafts
        return options


def until_end(token_ids: Sequence[int], eos_token_id: int | list[int] | None) -> tuple[int, ...]:
    """Return a row's tokens without the padding after its end."""
    ends = set(eos_token_id if isinstance(eos_token_id, list) else [eos_token_id])
    length = next((index for index, token in enumerate(token_ids, start=1) if token in ends), len(token_ids))
    return tuple(token_ids[:length])


def all_schedulers(settings: EvaluationSettings) -> list[str]:
    """Return the schedulers that speed is measured with, those asked for first."""
    return list(dict.fromkeys((*settings.schedulers, WHOLE_BLOCKS)))


def variant_name(drafter: str, scheduler: str) -> str:
    """Return what answers of a drafter under a scheduler are filed under."""
    return drafter if scheduler == WHOLE_BLOCKS else f"{drafter}, {scheduler}"


def _sampling_options(temperature: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False}
    # neither top-k nor top-p, whatever the target's generation configuration prefers
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
