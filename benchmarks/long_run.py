"""Whether rounds of a long batch stay as quick as they were, apart from attention's own growth.

    python -m benchmarks.long_run                  # minutes: random weights of a small shape
    python -m benchmarks.long_run --model smollm2  # more than an hour on one core

Rows that never end write on while rejected drafts are rolled back again and again. If those left anything behind,
rounds would slow down against plain steps at the same context. Both are timed piece by piece of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.loading import DTYPES, DtypeName, load_packaged
from benchmarks.loads import Load, make_load, random_prompts
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from benchmarks.simulation import SHAPES, random_target
from dspark_hf import DSparkAssistantModel
from dspark_hf.demo.packaged import PACKAGED_MODELS
from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling import Batch, CallInfo, FixedScheduler, RoundOutcome, Schedule, Scheduler

# of the untrained drafter
BLOCK_SIZE = 7


@dataclass(frozen=True)
class Step:
    """A round or a plain step: where it began, its seconds, and the tokens per row of its pass."""

    context_length: int
    seconds: float
    width: int = 1


class Recorded(Scheduler):
    """Decide as `scheduler` does, and keep what every round took."""

    name = "recorded"

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self.steps: list[Step] = []

    def start(self, call: CallInfo) -> Schedule:
        return _Recorded(self._scheduler.start(call), self.steps)


class _Recorded(Schedule):
    def __init__(self, schedule: Schedule, steps: list[Step]):
        self._schedule = schedule
        self._steps = steps
        self.wants_margins = schedule.wants_margins

    def num_drafts(self, batch: Batch) -> int:
        return self._schedule.num_drafts(batch)

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        return self._schedule.admit(drafted, batch)

    def observe(self, outcome: RoundOutcome) -> None:
        seconds = outcome.draft_seconds + outcome.other_seconds
        self._steps.append(Step(outcome.batch.context_length, seconds, outcome.width))
        self._schedule.observe(outcome)


class _Clock(LogitsProcessor):
    """Note the time of every plain step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(perf_counter())
        self.lengths.append(input_ids.shape[1])
        return scores

    def steps(self) -> Iterator[Step]:
        """Yield the steps between two calls."""
        for index in range(1, len(self.times)):
            yield Step(self.lengths[index - 1], self.times[index] - self.times[index - 1])


def run_plain(target: Any, load: Load, length: int) -> list[Step]:
    """Return the steps of plain `generate`."""
    clock = _Clock()
    target.generate(
        load.token_ids,
        attention_mask=load.attention_mask,
        max_new_tokens=length,
        logits_processor=LogitsProcessorList([clock]),
        **load.options,
    )
    return list(clock.steps())


def run_drafting(
    target: Any, drafter: DSparkAssistantModel, load: Load, length: int, num_drafts: int
) -> tuple[list[Step], int]:
    """Return the rounds, and how many drafts were rejected."""
    recorded = Recorded(FixedScheduler())
    output = target.generate(
        load.token_ids,
        attention_mask=load.attention_mask,
        max_new_tokens=length,
        assistant_model=drafter,
        scheduler=recorded,
        num_assistant_tokens=num_drafts,
        return_dict_in_generate=True,
        **load.options,
    )
    return recorded.steps, output.statistics.num_verified - output.statistics.num_accepted


def by_piece(steps: list[Step], start: int, piece: int, width: int) -> dict[int, float]:
    """Return the median milliseconds of steps of that width, by piece of the text."""
    grouped: dict[int, list[float]] = {}
    for step in steps:
        if step.width == width:
            grouped.setdefault((step.context_length - start) // piece, []).append(1000 * step.seconds)
    # a handful of steps says little
    return {index: median(times) for index, times in sorted(grouped.items()) if len(times) >= 8}


def load(model: str | None, shape: str, dtype: str) -> tuple[str, Any, DSparkAssistantModel]:
    """Return a title, the target, and its drafter: the shipped one, or an untrained one for random weights."""
    if model is None:
        target = random_target(shape, DTYPES[dtype], "cpu")
        fresh: Any = DSparkAssistantModel.from_target(
            target, num_hidden_layers=1, markov_rank=64, block_size=BLOCK_SIZE
        )
        return f"random weights in the shape of {shape}", target, fresh.to(DTYPES[dtype])
    packaged = load_packaged(model, dtype)
    return packaged.title, packaged.target, packaged.drafter


def main(
    model: Annotated[str | None, typer.Option(help=f"A packaged target: {', '.join(PACKAGED_MODELS)}.")] = None,
    shape: Annotated[
        str, typer.Option(help=f"Without --model: random weights of that shape: {', '.join(SHAPES)}.")
    ] = "small",
    rows: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=16)] = 2000,
    num_drafts: Annotated[int, typer.Option(min=1)] = 3,
    piece: Annotated[int, typer.Option(min=8, help="Tokens of a piece of the text.")] = 250,
    dtype: DtypeName = "fp32",
    output: Annotated[Path, typer.Option(help="Where the table goes.")] = FOLDER / "results" / "long_run.md",
) -> None:
    """Measure, print the table and write it to a file."""
    title, target, drafter = load(model, shape, dtype)
    prompts = random_prompts(rows, target.config.get_text_config().vocab_size, seed=0)
    batch = make_load(prompts, 0, torch.device("cpu"), {"do_sample": False, "eos_token_id": None})
    console = Console()
    with console.status("plain"):
        plain = by_piece(run_plain(target, batch, max_new_tokens), batch.token_ids.shape[1], piece, 1)
    with console.status("drafting"):
        steps, num_rejected = run_drafting(target, drafter, batch, max_new_tokens, num_drafts)
        rounds = by_piece(steps, batch.token_ids.shape[1], piece, 1 + num_drafts)
    lines = [
        f"# A long run: {title}, {rows} rows, {max_new_tokens} new tokens",
        "",
        f"{dtype}, greedy after random prompts, {num_drafts} drafts in every round. Times are medians of a piece.",
        "",
        *describe_run(),
        "",
        f"- rejected drafts: {num_rejected}",
        "",
        "| new tokens | plain step, ms | round, ms | round / step |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {index * piece} to {(index + 1) * piece} | {plain[index]:.1f} | {rounds[index]:.1f} "
            f"| {rounds[index] / plain[index]:.2f} |"
            for index in sorted(set(plain) & set(rounds))
        ),
    ]
    console.print(write_page(lines, output), markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
