"""Drafts that branch beside chains: tokens per pass, and speed, of `generate` itself.

    python -m benchmarks.branching --processor-time

Each prompt is decoded in all ways in turns, another one first each time, so that a slow minute of the machine hits all
of them. Tokens per pass do not depend on the machine.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.loading import (
    PROMPTS,
    DtypeName,
    Packaged,
    PackagedName,
    ProcessorTime,
    PromptsFile,
    choose_clock,
    load_packaged,
)
from benchmarks.loads import make_load
from benchmarks.lookup import PLAIN, make_sets, measure, table
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf.generation import decoding, statistics
from dspark_hf.generation.scheduling import reset_learned_state


def make_ways(packaged: Packaged, chains: str, trees: str) -> dict[str, dict[str, Any]]:
    """Return what `generate` is told, by way: chains and trees of these sizes, and the default with and without."""
    # what is learned belongs to a drafter, and what one way has learned must not serve the other
    drafter, other = ({"assistant_model": copy.deepcopy(packaged.drafter)} for _ in range(2))
    fixed = {**drafter, "scheduler": "fixed", "drafts": "model"}
    ways: dict[str, dict[str, Any]] = {PLAIN: {}}
    ways |= {f"chain of {size}": {**fixed, "num_assistant_tokens": int(size)} for size in chains.split(",") if size}
    ways |= {f"tree of {size}": {**fixed, "draft_tree": int(size)} for size in trees.split(",") if size}
    return {**ways, "default": drafter, "default, draft_tree=off": {**other, "draft_tree": "off"}}


def main(
    prompts: PromptsFile = PROMPTS,
    model: PackagedName = "smollm2",
    dtype: DtypeName = "bf16",
    sets: Annotated[str, typer.Option(help="Comma-separated.")] = "questions,chat,code completion",
    chains: Annotated[str, typer.Option(help="Sizes, comma-separated.")] = "2,7",
    trees: Annotated[str, typer.Option(help="Sizes, comma-separated.")] = "7,15",
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of a set.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Runs whose median counts.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 96,
    processor_time: ProcessorTime = False,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = FOLDER / "results" / "branching.md",
) -> None:
    """Measure, print the tables and write them to a file, after every set."""
    clock, console = choose_clock(processor_time=processor_time), Console()
    # the default decides by the same clock
    decoding.perf_counter = statistics.perf_counter = clock  # type: ignore[attr-defined]
    packaged = load_packaged(model, dtype)
    seconds = "processor time of one thread" if processor_time else "time"
    lines = [
        f"# Drafts that branch: {packaged.title}, {dtype}",
        "",
        f"Greedy, one row, {max_new_tokens} new tokens at most, {num_prompts} prompts a set (questions from "
        f"`{prompts.name}`), {runs} interleaved run(s); {seconds}. Chains and trees of a size are the drafter's "
        "alone; the default may also look drafts up, and what it learns in the first prompts counts.",
        "",
        *describe_run(),
    ]
    encoded = make_sets(packaged, prompts, num_prompts)
    for name in sets.split(","):
        reset_learned_state()
        loads = [make_load([prompt], 0, packaged.target.device, {}) for prompt in encoded[name]]
        ways = make_ways(packaged, chains, trees)
        with console.status(name):
            measured = measure(
                packaged.target, ways, loads, runs=runs, max_new_tokens=max_new_tokens, clock=clock, warms_up=False
            )
        lines += ["", f"## {name}", "", *table(measured)]
        console.print(write_page(lines, output), markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
