"""`dspark-hf eval`: drafters on prompt files, measured and written down."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dspark_hf.cli.hints import say_next
from dspark_hf.cli.options import (
    MEASURING,
    MODELS,
    OUTPUT,
    WRITING,
    Dtype,
    NumDraftsOption,
    Scheduler,
    packaged_folder,
)
from dspark_hf.console import say


def evaluate(
    target: Annotated[
        str, typer.Option(help="Folder or hub name of the model to accelerate.", callback=packaged_folder)
    ],
    drafter: Annotated[str, typer.Option(help="Folder or hub name of its drafter.")],
    prompt_files: Annotated[
        list[Path] | None, typer.Argument(help="Prompt sets, JSON Lines; named by their stems.")
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="A prompt set; the same as a file without an option.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Another drafter to compare with; may be given several times.", rich_help_panel=MODELS),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="First prompts of each file; default: all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Length of an answer.", rich_help_panel=WRITING)] = 128,
    temperature: Annotated[
        list[float] | None,
        typer.Option(min=0, help="0 is greedy (the default); may be given several times.", rich_help_panel=WRITING),
    ] = None,
    num_drafts: NumDraftsOption = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Answers per prompt and variant; speeds are medians.", rich_help_panel=MEASURING)
    ] = 3,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Also measure speed with this many rows per call.", rich_help_panel=MEASURING)
    ] = 1,
    scheduler: Annotated[
        list[Scheduler] | None,
        typer.Option(
            metavar="NAME",
            help="Measure speed with this scheduler, beside whole blocks (fixed); may be given several times. "
            "Default: adaptive.",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto is the target's own; only fp32 is identical for sure.", rich_help_panel=MODELS)
    ] = (Dtype.auto),
    device: Annotated[str, typer.Option(help="auto is the GPU if there is one.", rich_help_panel=MODELS)] = "auto",
    output: Annotated[
        Path, typer.Option(help="Folder of evaluation.json, figures and report.html.", rich_help_panel=OUTPUT)
    ] = Path("evaluation"),
) -> None:
    """Measure drafters on prompt files: accepted length, speed, reliability; after Ctrl-C the same command goes on."""
    # imported here, so that the help is instant
    from dspark_hf.evaluation.run import EvaluationRequest, run_request
    from dspark_hf.evaluation.settings import DEFAULT_SCHEDULERS, EvaluationSettings
    from dspark_hf.evaluation.terminal import print_evaluation
    from dspark_hf.evaluation.writing import write_evaluation

    console = Console()
    files = (*(prompt_files or ()), *(prompts or ()))
    try:
        if not files:
            raise ValueError("`--prompts` must name a prompt set at least, got none. Give files, JSON Lines.")
        request = EvaluationRequest(
            target=target,
            drafters=(drafter, *(baseline or ())),
            prompt_files=files,
            num_prompts=num_prompts,
            dtype=dtype.value,
            device=device,
            output=output,
            settings=EvaluationSettings(
                max_new_tokens=max_new_tokens,
                temperatures=tuple(temperature or (0.0,)),
                num_drafts=num_drafts,
                repeats=repeats,
                batch_size=batch_size,
                schedulers=DEFAULT_SCHEDULERS if scheduler is None else tuple(one.value for one in scheduler),
            ),
        )
        evaluation, recording = run_request(request, console)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    # before anything is shown: what was measured took hours
    paths = write_evaluation(evaluation, output)
    if evaluation.ended_by is None:
        recording.discard()
    else:
        say(console, "The same command goes on where this one ended.")
    print_evaluation(evaluation, console)
    say(console, f"Written: {len(paths)} files; read {paths[-1]}")
    say_next(console, "chat", target, "--drafter", drafter)
    if evaluation.ended_by is not None or evaluation.has_mismatch:
        raise typer.Exit(1)
