"""An evaluation from loaded models to its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dspark_hf.evaluation.loading import Models
from dspark_hf.evaluation.measuring import Measuring
from dspark_hf.evaluation.results import DrafterInfo, Evaluation, summarize_set
from dspark_hf.evaluation.settings import EvaluationSettings
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.provenance import describe_run


def evaluate(
    models: Models,
    sets: Mapping[str, Sequence[Tensor]],
    settings: EvaluationSettings,
    *,
    advance: Callable[[str], None] = lambda name: None,
) -> Evaluation:
    """Measure drafters on prompt sets: accepted length, speed, and what their confidence is worth.

    Ctrl-C, or an error of PyTorch such as running out of memory, ends it early; what was measured is returned, and
    `ended_by` says why. `advance` is called after every prompt or batch with the name of its set.

    Args:
        models: the target and the drafters to compare.
        sets: every set's prompts, token ids `(1, T)` each.
        settings: how to measure.
        advance: told of progress.

    Raises:
        ValueError: before anything is measured, if a drafter was not made for the target.
    """
    measuring = Measuring(models.target, models.drafters, sets, settings)
    ended_by = None
    try:
        measuring.run(advance)
    except (KeyboardInterrupt, RuntimeError) as error:
        if not measuring.measurements[0].turns:
            raise
        ended_by = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    return Evaluation(
        target=models.target.config.name_or_path or type(models.target).__name__,
        dtype=str(models.target.dtype).removeprefix("torch."),
        device=str(models.target.device),
        drafters=tuple(_describe(name, drafter.config) for name, drafter in models.drafters.items()),
        settings=settings,
        provenance=describe_run(is_on_cpu=models.target.device.type == "cpu"),
        ended_by=ended_by,
        sets=tuple(
            summarize_set(measurement, list(models.drafters), len(sets[measurement.name]), settings)
            for measurement in measuring.measurements
            if measurement.turns
        ),
    )


def num_turns(sets: Mapping[str, Sequence[Tensor]], settings: EvaluationSettings) -> int:
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
