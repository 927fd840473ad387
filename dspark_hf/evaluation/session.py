"""What `dspark-hf eval` does: check, load, measure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging

from dspark_hf.evaluation.loading import check_drafters, encode_sets, load_models, read_prompt_sets
from dspark_hf.evaluation.results import Evaluation
from dspark_hf.evaluation.run import evaluate, num_turns
from dspark_hf.evaluation.settings import EvaluationSettings
from dspark_hf.figures import check_plotting


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


def run_request(request: EvaluationRequest, console: Console) -> Evaluation:
    """Check everything that can be checked at once, load, and measure with a progress bar.

    Raises:
        ValueError: before anything is measured, if something is wrong with the request.
    """
    check_plotting()
    if request.output.exists() and not request.output.is_dir():
        raise ValueError(f"`--output` must be a folder, got the file {str(request.output)!r}. Name another.")
    sets = read_prompt_sets(request.prompt_files, request.num_prompts)
    with _quiet_transformers():
        drafters = check_drafters(request.drafters, request.settings.num_drafts)
        with console.status("Loading the models ..."):
            folders = dict(zip(drafters, request.drafters, strict=True))
            models = load_models(request.target, folders, dtype=request.dtype, device=request.device)
        encoded = encode_sets(sets, models, request.settings.max_new_tokens)
        with _progress_bar(console) as progress:
            task = progress.add_task("warming up", total=num_turns(encoded, request.settings))
            return evaluate(
                models,
                encoded,
                request.settings,
                advance=lambda name: progress.update(task, advance=1, description=name),
            )


def _progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
