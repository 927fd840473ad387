"""What `dspark-hf eval` does: check, load, measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from torch import Tensor

from dspark_hf.console import printable, progress_bar, quiet_transformers, say
from dspark_hf.damage import check_replaceable
from dspark_hf.evaluation.loading import Models, check_drafters, encode_sets, load_models, read_prompt_sets
from dspark_hf.evaluation.measuring import Measuring, SetMeasurement
from dspark_hf.evaluation.recording import Recording, describe
from dspark_hf.evaluation.results import DrafterInfo, Evaluation, summarize_set
from dspark_hf.evaluation.sample import SampleAnswer, sample_answer
from dspark_hf.evaluation.settings import EvaluationSettings
from dspark_hf.figures import check_plotting
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.provenance import describe_run


def evaluate(
    models: Models,
    sets: Mapping[str, Sequence[Tensor]],
    settings: EvaluationSettings,
    *,
    advance: Callable[[str], None] = lambda name: None,
    recording: Recording | None = None,
) -> Evaluation:
    """Measure drafters on prompt sets: accepted length, speed, and what their confidence is worth.

    Ctrl-C, or an error of PyTorch such as running out of memory, ends it early; what was measured is returned, and
    `ended_by` says why. `advance` is called after every prompt or batch with the name of its set.

    Args:
        models: the target and the drafters to compare.
        sets: every set's prompts, token ids `(1, T)` each.
        settings: how to measure.
        advance: told of progress.
        recording: where measurements are written as they come, and looked for first.

    Raises:
        ValueError: before anything is measured, if a drafter was not made for the target, or its confidence is no
            number.
    """
    measuring = Measuring(models.target, models.drafters, sets, settings, recording)
    ended_by = None
    try:
        measuring.run(advance)
    except (KeyboardInterrupt, RuntimeError) as error:
        if not measuring.measurements[0].trials:
            raise
        ended_by = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    return Evaluation(
        target=printable(models.target.config.name_or_path or type(models.target).__name__),
        dtype=str(models.target.dtype).removeprefix("torch."),
        device=str(models.target.device),
        drafters=tuple(_describe(name, drafter.config) for name, drafter in models.drafters.items()),
        settings=settings,
        provenance=describe_run(is_on_cpu=models.target.device.type == "cpu"),
        ended_by=ended_by,
        sets=tuple(
            summarize_set(measurement, list(models.drafters), len(sets[measurement.name]), settings)
            for measurement in measuring.measurements
            if measurement.trials
        ),
        sample=_sample(models, measuring.measurements[0]),
    )


def _sample(models: Models, measurement: SetMeasurement) -> SampleAnswer | None:
    if models.tokenizer is None or not measurement.trials:
        return None
    answer = measurement.trials[0][next(iter(models.drafters))][0]
    return sample_answer(answer, models.tokenizer, measurement.name, measurement.temperature)


def num_trials(sets: Mapping[str, Sequence[Tensor]], settings: EvaluationSettings) -> int:
    """Return how often `evaluate` will call `advance`."""
    sizes = [len(prompts) for prompts in sets.values()]
    batches = [0 if settings.batch_size == 1 else -(-size // settings.batch_size) for size in sizes]
    return len(settings.temperatures) * (sum(sizes) + sum(batches))


def _describe(name: str, config: DSparkConfig) -> DrafterInfo:
    return DrafterInfo(
        name=name,
        block_size=config.block_size,
        has_markov_head=config.markov_rank > 0,
        has_confidence_head=config.enable_confidence_head,
        is_calibrated=config.sts_temperatures is not None,
    )


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, and where the result goes.

    Args:
        target: folder or hub name of the target.
        drafters: folders or hub names; the first is the one in question.
        prompt_files: one prompt set each.
        num_prompts: first prompts of each file; None means all.
        dtype: a key of `dspark_hf.loading.DTYPES`.
        device: a PyTorch device, or `"auto"`.
        output: folder of the result.
        settings: how to measure.
    """

    target: str
    drafters: tuple[str, ...]
    prompt_files: tuple[Path, ...]
    num_prompts: int | None
    dtype: str
    device: str
    output: Path
    settings: EvaluationSettings


def run_request(request: EvaluationRequest, console: Console) -> tuple[Evaluation, Recording]:
    """Check everything that can be checked at once, load, and measure with a progress bar.

    Returns the evaluation, and the file of what was measured; a run of the same request goes on from that.

    Raises:
        ValueError: before anything is measured, if something is wrong with the request.
    """
    check_plotting()
    if request.output.exists() and not request.output.is_dir():
        raise ValueError(f"`--output` must be a folder, got the file {str(request.output)!r}. Name another.")
    check_replaceable("--output", request.output, "evaluation.json", {"is_complete", "sets"}, "report.html")
    sets = read_prompt_sets(request.prompt_files, request.num_prompts)
    with quiet_transformers():
        drafters = check_drafters(request.drafters, request.settings.num_drafts)
        with console.status("Loading the models ..."):
            folders = dict(zip(drafters, request.drafters, strict=True))
            models = load_models(request.target, folders, dtype=request.dtype, device=request.device)
        encoded = encode_sets(sets, models, request.settings.max_new_tokens)
        description = describe(models.target, {"target": request.target, **folders}, encoded, request.settings)
        recording = Recording(request.output, description)
        if len(recording):
            say(console, f"Going on after {len(recording)} trials measured before, in {recording.path}.")
        with closing(recording), progress_bar(console) as progress:
            task = progress.add_task("warming up", total=num_trials(encoded, request.settings))
            evaluation = evaluate(
                models,
                encoded,
                request.settings,
                advance=lambda name: progress.update(task, advance=1, description=escape(name)),
                recording=recording,
            )
    return evaluation, recording
