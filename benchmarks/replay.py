"""Schedulers beside fixed blocks on real drafts at measured costs, without the noise of the machine.

    python -m benchmarks.replay --prompts questions.jsonl

The drafts at every position of the texts are recorded once, then what passes and drafts cost here. All ways replay
these, under noise that is the same in every run: **times are simulated**, what is drafted, accepted and learnt is not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.loading import PROMPTS, DtypeName, PackagedName, PromptsFile, load_packaged
from benchmarks.loads import DEFAULT
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from benchmarks.recordings import CONTEXT, DISTURBANCE, DISTURBED, Clock, Text, Written, fewer_right, record, replay
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.fast_passes import fast_passes
from dspark_hf.generation.scheduling import AdaptiveScheduler, CallInfo, FixedScheduler, Scheduler, reset_learned_state
from dspark_hf.generation.scheduling.costs.online import OnlineCosts
from dspark_hf.generation.scheduling.costs.profile import measure_costs
from dspark_hf.generation.scheduling.costs.table import CostTable
from dspark_hf.generation.scheduling.costs.workload import StepTimer
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.prompts import encode_prompt, read_prompts

FIRST = "first batch"
# fixed blocks that `benchmarks.throughput` measures
USUAL = (3, 5, 7)
# of every measured step
REPEATS = 5
Ratios = dict[str, list[float]]


@dataclass(frozen=True)
class Session:
    """What a process decodes: batches of `num_rows` texts, one after the other, nothing learnt beforehand."""

    target: TargetAdapter
    drafter: Drafter
    texts: Sequence[Text]
    num_rows: int
    num_batches: int
    length: int
    costs: CostTable
    noise: float

    def run(self, scheduler: Scheduler, seed: int, max_drafts: int) -> list[Written]:
        """Return what the batches took, whose texts depend on the seed as the noise does."""
        reset_learned_state()
        clock = Clock(self.costs, self.noise, random.Random(seed))
        call = CallInfo(self.target, self.drafter, self.num_rows, max_drafts, CONTEXT)
        chosen = random.Random(seed).sample(range(len(self.texts)), len(self.texts))
        batches = [
            [self.texts[chosen[(number * self.num_rows + row) % len(chosen)]] for row in range(self.num_rows)]
            for number in range(self.num_batches)
        ]
        return [replay(scheduler.start(call), batch, self.length, clock, max_drafts) for batch in batches]


def compare(session: Session, num_sessions: int) -> Ratios:
    """Return the speed of every way against plain decoding, by session; and that of the default's first batch."""
    block_size = session.drafter.block_size
    ratios: Ratios = {}
    for seed in range(num_sessions):
        plain, *fixed = (session.run(FixedScheduler(), seed, count) for count in range(block_size + 1))
        # one for the session: it keeps what it has seen of costs
        default = session.run(AdaptiveScheduler(costs=OnlineCosts()), seed, block_size)
        speeds = {f"fixed {count}": speed_of(batches) for count, batches in enumerate(fixed, start=1)}
        for name, speed in {**speeds, DEFAULT: speed_of(default)}.items():
            ratios.setdefault(name, []).append(speed / speed_of(plain))
        ratios.setdefault(FIRST, []).append(speed_of(default[:1]) / speed_of(plain[:1]))
    return ratios


def speed_of(batches: Sequence[Written]) -> float:
    """Return tokens per second."""
    return sum(one.num_tokens for one in batches) / sum(one.seconds for one in batches)


def row_of(num_rows: int, ratios: Ratios) -> str:
    """Return a line of the table."""
    fixed = [name for name in ratios if name.startswith("fixed")]
    usual = [f"fixed {count}" for count in USUAL if f"fixed {count}" in ratios]
    best, best_usual = (max(names, key=lambda name: mean(ratios[name])) for names in (fixed, usual))
    default = ratios[DEFAULT]
    against = [ours / theirs for ours, theirs in zip(default, ratios[best_usual], strict=True)]
    return (
        f"| {num_rows} | {' | '.join(f'{mean(ratios[name]):.2f}' for name in usual)} | {mean(ratios[best]):.2f} "
        f"({best.removeprefix('fixed ')}) | {with_error(default)} | {mean(ratios[FIRST]):.2f} "
        f"| {with_error(against)} |"
    )


def with_error(values: Sequence[float]) -> str:
    """Return the mean and its standard error."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values) / sqrt(len(values)):.3f}" if len(values) > 1 else "")


def costs_here(target: TargetAdapter, drafter: Drafter, rows: Sequence[int]) -> CostTable:
    """Return what passes and drafts cost on this machine."""
    sizes = range(1, drafter.block_size + 1)
    passes = [(count, CONTEXT, width) for count in rows for width in (*sizes, drafter.block_size + 1)]
    drafts = [(count, CONTEXT, size) for count in rows for size in sizes]
    with target, fast_passes(target.model, drafter):
        return measure_costs(StepTimer(target, drafter), passes, drafts, repeats=REPEATS)


def cost_lines(costs: CostTable, rows: Sequence[int], block_size: int) -> list[str]:
    """Return the table of costs, those of a plain step with one row being 1."""
    unit = costs.verify_seconds(1, 1, CONTEXT)
    widths = range(1, block_size + 2)
    lines = [
        f"| rows | {' | '.join(f'pass over {width}' for width in widths)} | {block_size} drafts |",
        f"| ---: | {' | '.join('---:' for _ in widths)} | ---: |",
    ]
    for count in rows:
        cells = [costs.verify_seconds(count, width, CONTEXT) for width in widths]
        cells.append(costs.draft_seconds(count, block_size, CONTEXT))
        lines.append(f"| {count} | {' | '.join(f'{seconds / unit:.2f}' for seconds in cells)} |")
    return lines


def main(
    prompts: PromptsFile = PROMPTS,
    model: PackagedName = "smollm2",
    rows: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2,4,8,16",
    num_prompts: Annotated[int, typer.Option(min=1, help="Texts that are recorded.")] = 48,
    length: Annotated[int, typer.Option(min=8, help="New tokens of a row.")] = 64,
    batches: Annotated[int, typer.Option(min=1, help="Batches of a session.")] = 5,
    sessions: Annotated[int, typer.Option(min=2, help="Sessions, each with nothing learnt.")] = 16,
    noise: Annotated[float, typer.Option(min=0, help="Standard deviation of a step's time, as a share.")] = 0.05,
    dtype: DtypeName = "fp32",
    output: Annotated[Path | None, typer.Option(help="Where the page goes; default: beside the others.")] = None,
) -> None:
    """Record, replay, print the tables and write them to a file."""
    console = Console()
    packaged = load_packaged(model, dtype)
    drafter: Any = packaged.drafter
    counts = [int(one) for one in rows.split(",")]
    target = TargetAdapter(packaged.target, drafter.target_layer_ids)
    with console.status("costs"):
        # rows that finish leave the batch
        costs = costs_here(target, drafter, sorted({1, *counts}))
    encoded = [encode_prompt(prompt, packaged.tokenizer).flatten() for prompt in read_prompts(prompts, num_prompts)]
    with console.status("recording"):
        texts = record(packaged.target, drafter, encoded, length)
    cases = {
        "as recorded": texts,
        "two blocks in three are wrong, and do not look it": fewer_right(texts, 1 / 3),
        "all drafts are wrong, and do not look it": fewer_right(texts, 0.0),
    }
    lines = [
        f"# Replayed: {packaged.title}, {dtype}",
        "",
        f"Real drafts behind {len(texts)} prompts of `{prompts.name}`, greedy, at the costs below; **times are "
        f"simulated**: noise of {noise:.0%}, and {DISTURBED:.0%} of the steps take {DISTURBANCE} times as long. "
        f"Speed, plain steps of our own loop = 1, means over {sessions} sessions ± standard error; a session is "
        f"{batches} batches of "
        f"{length} new tokens a row and starts with nothing learnt.",
        "",
        *describe_run(),
    ]
    usual = [f"fixed {count}" for count in USUAL if count <= drafter.block_size]
    for name, chosen in cases.items():
        lines += ["", f"## {name[0].upper()}{name[1:]}", ""]
        lines.append(
            f"| rows | {' | '.join(usual)} | best of 1 to {drafter.block_size} | default | its first batch "
            f"| default / best of {', '.join(map(str, USUAL))} |"
        )
        lines.append(f"| ---: | {' | '.join('---:' for _ in usual)} | ---: | ---: | ---: | ---: |")
        for count in counts:
            with console.status(f"{name}, {count} rows"):
                session = Session(target, drafter, chosen, count, batches, length, costs, noise)
                lines.append(row_of(count, compare(session, sessions)))
    lines += ["", "## Costs", "", "A plain step of one row = 1.", "", *cost_lines(costs, counts, drafter.block_size)]
    path = output or FOLDER / "results" / f"replay-{model}-{dtype}.md"
    console.print(write_page(lines, path), markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
