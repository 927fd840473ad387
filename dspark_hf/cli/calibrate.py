"""`dspark-hf calibrate`: temperatures for a drafter's confidence, fitted on prompts it was not trained on."""

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dspark_hf.cli.hints import say_next
from dspark_hf.cli.options import FIT, MODELS, OUTPUT, WRITING, Dtype, packaged_folder
from dspark_hf.console import say

if TYPE_CHECKING:
    from torch import Tensor

    from dspark_hf.calibration.observations import Observations
    from dspark_hf.calibration.report import CalibrationReport
    from dspark_hf.evaluation.loading import Models
    from dspark_hf.prompts import Prompt


_OBJECTIVE_NAMES = {"ece": "expected calibration error, as in the paper", "brier": "Brier score"}


class Objective(str, Enum):
    """What a fit makes small."""

    auto = "auto"
    ece = "ece"
    brier = "brier"


def calibrate(
    target: Annotated[
        str,
        typer.Option(help="Folder or hub name of the model that the drafter is for.", callback=packaged_folder),
    ],
    drafter: Annotated[str, typer.Option(help="Folder or hub name of the drafter.")],
    prompts: Annotated[Path, typer.Option(help="Prompts the drafter was not trained on, JSON Lines.")],
    num_prompts: Annotated[int | None, typer.Option(min=2, help="First prompts of the file; default: all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=3, help="Length of an answer.", rich_help_panel=WRITING)] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, help="0 is greedy; default: what the target's generation config says.", rich_help_panel=WRITING
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.", rich_help_panel=WRITING)] = 1,
    objective: Annotated[
        Objective,
        typer.Option(
            help="Make this small; ece is the paper's; auto: the better of both by Brier score.", rich_help_panel=FIT
        ),
    ] = Objective.auto,
    min_reached: Annotated[
        int,
        typer.Option(
            min=1,
            help="A slot that fewer blocks reach takes the temperature of the slot before it.",
            rich_help_panel=FIT,
        ),
    ] = 100,
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.", rich_help_panel=WRITING)] = 0,
    dtype: Annotated[Dtype, typer.Option(help="auto is the target's own.", rich_help_panel=MODELS)] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto is the GPU if there is one.", rich_help_panel=MODELS)] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            help="New folder for the calibrated drafter; default: change the drafter's own.", rich_help_panel=OUTPUT
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder of calibration.json and reliability.png; default: none.", rich_help_panel=OUTPUT),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Save even if validation prompts get no better.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Fit the temperatures of a drafter's confidence; texts stay what they are. Ctrl-C goes on with what there is."""
    # imported here, so that the help is instant
    from transformers import set_seed

    from dspark_hf.calibration.observations import collect_observations
    from dspark_hf.calibration.saving import save_temperatures

    console = Console()
    try:
        read = _check_request(drafter, prompts, num_prompts, output, report)
        _check_min_reached(min_reached, len(read), max_new_tokens)
        with console.status("Loading the models ..."):
            models, encoded = _load(target, drafter, read, dtype.value, device, max_new_tokens)
        set_seed(seed)
        observations = collect_observations(
            models.target,
            models.drafters["drafter"],
            encoded,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            min_reached=min_reached,
        )
        result = _fit(observations, objective, min_reached)
        _show(console, result)
        if report is not None:
            title = f"{Path(drafter).name} for {Path(target).name}, validation prompts of {prompts.stem}"
            _write_report(report, result, observations, title, is_on_cpu=models.target.device.type == "cpu")
            say(console, f"Report: {report}")
        if not result.is_improvement and not force:
            console.print("Not saved: the validation prompts get no better. Use more prompts, or --force.")
            raise typer.Exit(1)
        folder = save_temperatures(drafter, result.temperatures, output)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    say(console, f"Saved: {folder}")
    say_next(console, "eval", "--target", target, "--drafter", str(folder), "questions.jsonl")


def _check_request(
    drafter: str, prompts: Path, num_prompts: int | None, output: Path | None, report: Path | None
) -> "list[Prompt]":
    """Return the prompts, after all checks that need no model."""
    from dspark_hf.calibration.observations import check_confidence_head
    from dspark_hf.calibration.saving import check_destination
    from dspark_hf.damage import check_replaceable
    from dspark_hf.figures import check_plotting
    from dspark_hf.loading import read_drafter_config
    from dspark_hf.prompts import read_prompts

    if report is not None:
        check_plotting()
        if report.exists() and not report.is_dir():
            raise ValueError(f"`--report` must be a folder, got the file {str(report)!r}. Name another.")
        check_replaceable("--report", report, "calibration.json", {"sts_temperatures"}, "reliability.png")
    if not prompts.is_file():
        raise ValueError(f"`--prompts` must be a file, got {str(prompts)!r}, which is none. Correct the path.")
    read = read_prompts(prompts, num_prompts)
    if len(read) < 2:
        raise ValueError(
            f"`--prompts` must hold at least 2 prompts, one to fit on and one to validate on, got {len(read)}. "
            "Add some."
        )
    config = read_drafter_config(drafter)
    check_confidence_head(config.enable_confidence_head)
    check_destination(drafter, output)
    return read


def _check_min_reached(min_reached: int, num_prompts: int, max_new_tokens: int) -> None:
    """Raise a `ValueError` if no answers at all could give as many blocks as the fit needs."""
    # every other prompt is fitted; the prefill writes the first token, and a round at least one, with room for a draft
    most = (num_prompts + 1) // 2 * (max_new_tokens - 2)
    if most < min_reached:
        raise ValueError(
            f"`--min-reached` must be at most {most}, as many blocks as {num_prompts} prompts, of which every other "
            f"one is fitted, can give in {max_new_tokens} tokens, got {min_reached}. Give more `--prompts`, raise "
            "`--max-new-tokens`, or lower it."
        )


def _load(
    target: str, drafter: str, prompts: "list[Prompt]", dtype: str, device: str, max_new_tokens: int
) -> "tuple[Models, list[Tensor]]":
    """Return the models and the prompts' token ids `(T,)`, after the checks that need them."""
    from dspark_hf.calibration.observations import check_pair
    from dspark_hf.evaluation.loading import encode_sets, load_models

    models = load_models(target, {"drafter": drafter}, dtype=dtype, device=device)
    check_pair(models.target, models.drafters["drafter"])
    encoded = encode_sets({"--prompts": prompts}, models, max_new_tokens)
    return models, [token_ids[0] for token_ids in encoded["--prompts"]]


def _fit(observations: "Observations", objective: Objective, min_reached: int) -> "CalibrationReport":
    """Return the fit that helps, the one with the lower Brier score if both do, or the paper's if none does."""
    from dspark_hf.calibration.report import calibrate as fit_and_score
    from dspark_hf.calibration.sts import OBJECTIVES

    names = OBJECTIVES if objective is Objective.auto else (objective.value,)
    results = [fit_and_score(observations, objective=name, min_reached=min_reached) for name in names]
    helpful = [result for result in results if result.is_improvement] or results[:1]
    # the calibration error cannot choose: blocks that all look alike may have a small one
    return min(helpful, key=lambda result: result.validation.after.mean_brier)


def _show(console: Console, result: "CalibrationReport") -> None:
    result.print_tables(console)
    for note in result.notes:
        console.print(note, soft_wrap=True)
    for name, split in (("fitted", result.fitting), ("not fitted", result.validation)):
        console.print(
            f"Survival, {split.num_prompts} prompts {name}: mean calibration error "
            f"{split.before.mean_ece:.4f} before, {split.after.mean_ece:.4f} after; mean Brier score "
            f"{split.before.mean_brier:.4f} before, {split.after.mean_brier:.4f} after.",
            soft_wrap=True,
        )
    console.print(f"Fitted to the {_OBJECTIVE_NAMES[result.fit.objective]}.")


def _write_report(
    folder: Path, result: "CalibrationReport", observations: "Observations", title: str, *, is_on_cpu: bool
) -> None:
    from dspark_hf.calibration.diagrams import draw_reliability
    from dspark_hf.files import write_whole
    from dspark_hf.provenance import describe_run

    folder.mkdir(parents=True, exist_ok=True)
    content = {**result.to_json(), "provenance": asdict(describe_run(is_on_cpu=is_on_cpu))}
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_whole(folder / "calibration.json", text.encode())
    _, validation = observations.split_by_prompt()
    path = folder / "reliability.png"
    draw_reliability(path, validation, result.temperatures, num_bins=result.num_bins, title=title)
