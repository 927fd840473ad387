"""Greedy accepted length of a drafter on prompt files, and whether its texts equal plain `generate`.

python -m benchmarks.acceptance gsm8k_eval.jsonl mbpp_eval.jsonl

The table of the repository. `dspark-hf eval` measures more, on any target and drafter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf.console import progress_bar
from dspark_hf.demo.packaged import PACKAGED_MODELS, converted_target, shipped_drafter
from dspark_hf.evaluation.loading import encode_sets, load_models, read_prompt_sets
from dspark_hf.evaluation.results import SetResult
from dspark_hf.evaluation.run import evaluate, num_trials
from dspark_hf.evaluation.settings import EvaluationSettings
from dspark_hf.generation.scheduling import FixedScheduler


def main(
    files: Annotated[list[Path], typer.Argument(help='JSON Lines, each {"turns": [...]}.')],
    num_prompts: Annotated[int, typer.Option(min=1)] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    target: Annotated[str | None, typer.Option(help="Default: the packaged SmolLM2.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Default: the shipped drafter.")] = None,
    output: Annotated[Path, typer.Option(help="Where the table goes.")] = FOLDER / "results" / "acceptance.md",
) -> None:
    """Measure in fp32, print the table and write it to a file."""
    model = PACKAGED_MODELS["smollm2"]
    # tau is that of whole blocks: so shall be the texts that are compared
    settings = EvaluationSettings(max_new_tokens=max_new_tokens, repeats=1, schedulers=(FixedScheduler.name,))
    sets = read_prompt_sets(files, num_prompts)
    target_folder = target or str(converted_target("smollm2"))
    drafter_folder = drafter or str(shipped_drafter(model))
    models = load_models(target_folder, {"drafter": drafter_folder}, dtype="fp32", device="cpu")
    prompts = encode_sets(sets, models, max_new_tokens)
    with progress_bar(Console()) as progress:
        task = progress.add_task("warming up", total=num_trials(prompts, settings))
        evaluation = evaluate(
            models, prompts, settings, advance=lambda name: progress.update(task, advance=1, description=name)
        )
    if evaluation.ended_by is not None:
        raise SystemExit(f"No table is written: the run ended early ({evaluation.ended_by}).")
    block_size = evaluation.drafters[0].block_size
    lines = [
        "# Accepted length",
        "",
        f"{Path(target).name if target else model.title}, fp32, greedy, blocks of {block_size}, the "
        f"first {num_prompts} prompts of each file, {max_new_tokens} new tokens at most. tau counts the bonus token.",
        "",
        *describe_run(),
        "",
        "| prompts | tau | accepted by position, given the prefix | identical to plain |",
        "| --- | ---: | --- | ---: |",
        *(_row(one) for one in evaluation.sets),
    ]
    print(write_page(lines, output))


def _row(one_set: SetResult) -> str:
    result = one_set.drafters[0]
    acceptance, speed = result.acceptance, result.speeds[0]
    tau = "" if acceptance.tau is None else f"{acceptance.tau.value:.2f}"
    rates = " ".join(f"{rate.value:.2f}" for rate in acceptance.rate_by_position)
    return f"| {one_set.name} | {tau} | {rates} | {speed.num_identical} of {speed.num_outputs} |"


if __name__ == "__main__":
    typer.run(main)
