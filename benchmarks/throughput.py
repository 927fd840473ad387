"""Tokens per second of batches: plain `generate`, fixed blocks, and the schedulers that weigh costs.

    python -m benchmarks.throughput --model smollm2 --prompts questions.jsonl
    python -m benchmarks.throughput --shape qwen3-4b --device cuda --dtype bf16 --rates 0.8,0.8,0.75,0.75,0.7,0.7,0.65

All ways decode the same batches in turns, another one first each time, so that a slow minute of the machine hits all
of them. What is measured is stored batch size by batch size: an interrupted run goes on where it was. Every batch size
starts as a new process does, with nothing learnt; only the schedulers that need a profile have one, of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks import loading
from benchmarks.loads import DEFAULT, PLAIN, WAYS, Load, Measured, make_load, random_prompts, run_once
from benchmarks.pages import FOLDER
from benchmarks.simulation import SHAPES, SimulatedDrafter, random_target
from benchmarks.throughput_report import draw, speculation_table, speed_table, summary
from benchmarks.throughput_store import Store
from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.scheduling import reset_learned_state
from dspark_hf.generation.scheduling.costs.storing import FOLDER_VARIABLE
from dspark_hf.prompts import encode_prompt, read_prompts

# a case that measures nothing
NO_CASE = "none"
GREEDY = {"do_sample": False}
# drafts of the longest fixed setting
BLOCK_SIZE = 7
# enough where all drafting loses
FEW_WAYS = (PLAIN, "fixed 3", DEFAULT)
# these measure a profile on first use
PROFILED = ("hardware_aware", "asynchronous")
WORST = ("random prompts", "untrained drafter", "temperature 2")


@dataclass(frozen=True)
class Case:
    """A target, a drafter, the batch of a run, `load(num_rows, run)`, and the ways to decode it."""

    name: str
    target: Any
    drafter: Drafter
    load: Callable[[int, int], Load]
    is_greedy: bool = True
    ways: tuple[str, ...] = tuple(WAYS)


def packaged_cases(packaged: loading.Packaged, prompts: Path) -> list[Case]:
    """Return real prompts with the shipped drafter, and the worst that may come."""
    target, tokenizer, drafter = packaged.target, packaged.tokenizer, packaged.drafter
    torch.manual_seed(0)
    untrained = _untrained(target, num_hidden_layers=2, markov_rank=64)
    encoded = [encode_prompt(prompt, tokenizer).flatten() for prompt in read_prompts(prompts)]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def real(num_rows: int, run: int, **options: Any) -> Load:
        chosen = [encoded[(run * num_rows + row) % len(encoded)] for row in range(num_rows)]
        return make_load(chosen, pad, target.device, options)

    def random(num_rows: int, run: int) -> Load:
        chosen = random_prompts(num_rows, target.config.get_text_config().vocab_size, seed=run)
        # such texts hardly ever end by themselves
        return make_load(chosen, pad, target.device, {**GREEDY, "eos_token_id": None})

    hot = {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    return [
        Case("prompts", target, drafter, lambda rows, run: real(rows, run, **GREEDY)),
        Case(WORST[0], target, drafter, random, ways=FEW_WAYS),
        Case(WORST[1], target, untrained, lambda rows, run: real(rows, run, **GREEDY), ways=FEW_WAYS),
        Case(WORST[2], target, drafter, lambda rows, run: real(rows, run, **hot), is_greedy=False, ways=FEW_WAYS),
    ]


def simulated_cases(shape: str, rates: list[float], dtype: torch.dtype, device: str) -> list[Case]:
    """Return a random target of a real shape, and drafts that are right at the given rates."""
    target = random_target(shape, dtype, device)
    drafter = SimulatedDrafter(_untrained(target), rates)

    def load(num_rows: int, run: int) -> Load:
        prompts = random_prompts(num_rows, target.config.vocab_size, seed=run)
        return make_load(prompts, 0, target.device, {**GREEDY, "eos_token_id": None})

    return [Case("simulated acceptance", target, drafter, load)]


def _untrained(target: Any, **fields: Any) -> Any:
    drafter: Any = DSparkAssistantModel.from_target(target, block_size=BLOCK_SIZE, **fields)
    return drafter.to(device=target.device, dtype=target.dtype)


def measure(
    case: Case, num_rows: int, runs: int, max_new_tokens: int, clock: Callable[[], float] = perf_counter
) -> dict[str, Measured]:
    """Return what every way took, run by run."""
    measured = {way: Measured() for way in case.ways}
    reset_learned_state()
    for way in case.ways:
        # kernels are chosen, costs are profiled
        _run(case, way, case.load(num_rows, 0), min(8, max_new_tokens), Measured(), clock)
    for run in range(runs):
        load = case.load(num_rows, run)
        first = run % len(case.ways)
        order = case.ways[first:] + case.ways[:first]
        texts: dict[str, Tensor] = {}
        for way in order:
            torch.manual_seed(run)
            texts[way] = _run(case, way, load, max_new_tokens, measured[way], clock)
        if case.is_greedy:
            for way in order:
                measured[way].is_identical.append(torch.equal(texts[way], texts[PLAIN]))
    return measured


def _run(
    case: Case, way: str, load: Load, max_new_tokens: int, measured: Measured, clock: Callable[[], float]
) -> Tensor:
    if isinstance(case.drafter, SimulatedDrafter) and way != PLAIN:
        script = case.target.generate(
            load.token_ids, attention_mask=load.attention_mask, max_new_tokens=max_new_tokens, **load.options
        )
        case.drafter.script = script
        case.drafter.num_padded = (load.attention_mask == 0).sum(1).tolist()
    with _profiles(is_wanted=way in PROFILED):
        return run_once(case.target, case.drafter, way, load, max_new_tokens, measured, clock)


@cache
def _profile_folder() -> Path:
    return Path(mkdtemp(prefix="throughput-profiles-"))


@contextmanager
def _profiles(*, is_wanted: bool) -> Iterator[None]:
    """Let schedulers find no profiles but those that this process has measured, or none at all."""
    before = os.environ.get(FOLDER_VARIABLE)
    os.environ[FOLDER_VARIABLE] = str(_profile_folder() / ("measured" if is_wanted else "none"))
    try:
        yield
    finally:
        os.environ.pop(FOLDER_VARIABLE)
        if before is not None:
            os.environ[FOLDER_VARIABLE] = before


def write_report(store: Store, title: str, description: str, path: Path) -> str:
    """Write the page of tables, with figures of what was measured in all ways, and return it."""
    results = store.results()
    lines = [f"# Throughput: {title}", "", description, "", *summary(results, WORST)]
    for case, by_rows in results.items():
        lines += [
            *("", f"## {case}", "", *store.provenance(case)),
            *("", "Speed, plain = 1, ± standard error:", "", *speed_table(by_rows)),
            *("", "tau / verified drafts per row and round:", "", *speculation_table(by_rows)),
        ]
        # three lines need no picture
        if set(next(iter(by_rows.values()))) == set(WAYS):
            figure = store.path(case, "png")
            draw(by_rows, f"{title}, {case}", figure)
            lines += ["", f"![{case}]({figure.name})"]
    text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def main(
    model: loading.PackagedName = "smollm2",
    prompts: loading.PromptsFile = loading.PROMPTS,
    shape: Annotated[str | None, typer.Option(help="A random target of that shape instead.")] = None,
    rates: Annotated[
        str, typer.Option(help="Simulated chance of each draft, with --shape.")
    ] = "0.8,0.8,0.75,0.75,0.7,0.7,0.65",
    rows: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2,4,8,16",
    runs: Annotated[int, typer.Option(min=1, help="Runs whose median counts.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 96,
    dtype: loading.DtypeName = "fp32",
    device: Annotated[str, typer.Option(help="With --shape.")] = "cpu",
    cases: Annotated[
        str | None, typer.Option(help=f"Comma-separated; default: all; {NO_CASE!r} writes the page anew.")
    ] = None,
    processor_time: loading.ProcessorTime = False,
    output: Annotated[Path, typer.Option(help="Folder of the page, figures and numbers.")] = FOLDER / "results",
) -> None:
    """Measure, and write a page with tables and figures."""
    console = Console()
    clock = loading.choose_clock(processor_time=processor_time)
    chances = [float(rate) for rate in rates.split(",")]
    if len(chances) != BLOCK_SIZE or not all(0 < chance < 1 for chance in chances):
        raise typer.BadParameter(f"`--rates` must be {BLOCK_SIZE} chances between 0 and 1, got {rates!r}. Correct it.")
    if shape is not None and shape not in SHAPES:
        raise typer.BadParameter(f"`--shape` must be one of {', '.join(SHAPES)}, got {shape!r}. Correct the name.")
    if shape is None:
        packaged = loading.load_packaged(model, dtype)
        found = packaged_cases(packaged, prompts)
        title, stem = f"{packaged.title}, {dtype}", f"throughput-{model}-{dtype}"
        text = f"the prompts of `{prompts.name}`"
    else:
        found = simulated_cases(shape, chances, loading.DTYPES[dtype], device)
        title, stem = f"random weights in the shape of {shape}, {dtype}", f"throughput-{shape}-{dtype}"
        text = f"random prompts. **Acceptance is simulated**: drafts are right at the rates {rates}"
    wanted = None if cases is None else cases.split(",")
    names = [case.name for case in found]
    if wanted is not None and not set(wanted) <= {*names, NO_CASE}:
        raise typer.BadParameter(f"`--cases` must be among {', '.join(names)}, got {cases!r}. Correct the name.")
    settings = {
        "model": shape or model,
        "prompts": prompts.name,
        "rates": rates if shape else None,
        "runs": runs,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "device": device,
        "processor_time": processor_time,
    }
    output.mkdir(parents=True, exist_ok=True)
    store = Store(output, stem, settings)
    for case in found:
        if wanted is not None and case.name not in wanted:
            continue
        for num_rows in (int(one) for one in rows.split(",")):
            if store.has(case.name, num_rows):
                continue
            with console.status(f"{case.name}, {num_rows} rows"):
                store.add(case.name, num_rows, measure(case, num_rows, runs, max_new_tokens, clock))
    seconds = loading.time_word(processor_time=processor_time)
    seconds += ", while schedulers go by the clock" * processor_time
    description = f"{max_new_tokens} new tokens at most, medians of {runs} interleaved runs, {text}; {seconds}."
    page = write_report(store, title, description, output / f"{stem}.md")
    console.print(page, soft_wrap=True, markup=False)


if __name__ == "__main__":
    typer.run(main)
