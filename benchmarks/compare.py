"""All ways to decode beside plain `generate`, in one table and one figure: targets, dtypes, sets, greedy and sampled.

    python -m benchmarks.compare --prompts questions.jsonl                                      # everything: hours
    python -m benchmarks.compare --models smollm2 --dtypes bf16 --sets chat --temperatures 0 --runs 1      # minutes

Every way has a fresh process for every set and run, where it takes turns with plain: first over the prompts once with
nothing learnt (cold), then once more (warm). What is measured is kept, and an interrupted comparison goes on where it
was. `plain again` is the control: how far from 1 it lies is the machine's doing. `no drafts` is our loop without any
draft: on CPUs, what its packed weights bring by themselves.

Left out, and why: Transformers' own DFlash takes drafters without a Markov head that propose any token, and the
shipped ones have a head and propose some tokens only; its assisted generation needs a small model of the same
vocabulary, which no package brings for these targets: name one's folder with `--draft-model`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.compare_report import AGAIN, STATES, Case, Results, draw
from benchmarks.loading import (
    DTYPES,
    PROMPTS,
    Packaged,
    ProcessorTime,
    PromptsFile,
    choose_clock,
    load_packaged,
    weight_bytes,
)
from benchmarks.loads import DEFAULT, Load, make_load
from benchmarks.lookup import PLAIN, PROMPT_LOOKUP_TOKENS, MeasuredDrafts, make_sets, measure
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf import LookupAssistant, provenance
from dspark_hf.demo.packaged import PACKAGED_MODELS, converted_target
from dspark_hf.figures import check_plotting
from dspark_hf.files import write_whole
from dspark_hf.journal import Journal
from dspark_hf.prompts import encode_prompt, user_turn

PROMPT_LOOKUP, ASSISTED = "prompt lookup", "assisted generation"
FIXED, LOOKUP, UNDRAFTED = "fixed 7", "lookup only", "no drafts"
# no text repeats so much
ENDLESS = 10**6
WRITING = "writing code"
SETS = ("questions", WRITING, "chat", "code completion", "copying")
TASKS = (
    "Write a Python function that returns the second largest number of a list.",
    "Write a Python function that removes all vowels from a string.",
    "Write a Python function that checks whether two words are anagrams.",
    "Write a Python function that merges two sorted lists into one sorted list.",
    "Write a Python function that counts how often each word occurs in a text.",
    "Write a Python function that converts a temperature from Celsius to Fahrenheit.",
)
# bytes that are read to measure how fast memory is: more than caches hold
READ = 2**28


@dataclass(frozen=True)
class Settings:
    """What makes measurements comparable; `draft_model` is the folder of a small model, for assisted generation."""

    prompts: str
    num_prompts: int
    max_new_tokens: int
    processor_time: bool
    draft_model: str
    top_p: float = 1.0


def make_ways(packaged: Packaged, draft_model: str) -> dict[str, dict[str, Any]]:
    """Return what `generate` is told, by way."""
    ways: dict[str, dict[str, Any]] = {
        AGAIN: {},
        PROMPT_LOOKUP: {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS},
        DEFAULT: {"assistant_model": packaged.drafter},
        FIXED: {
            "assistant_model": packaged.drafter,
            "drafts": "model",
            "scheduler": "fixed",
            "num_assistant_tokens": min(7, packaged.drafter.block_size),
        },
        LOOKUP: {"assistant_model": LookupAssistant()},
        UNDRAFTED: {"assistant_model": LookupAssistant(min_match=ENDLESS)},
    }
    if draft_model:
        small = AutoModelForCausalLM.from_pretrained(draft_model, dtype=packaged.target.dtype)
        ways[ASSISTED] = {"assistant_model": small}
    return ways


def prompts_of(packaged: Packaged, name: str, prompts: Path, count: int) -> list[Tensor]:
    """Return the encoded prompts of a set."""
    if name == WRITING:
        return [encode_prompt(user_turn(task), packaged.tokenizer) for task in TASKS[:count]]
    return make_sets(packaged, prompts, count)[name]


def measure_case(case: Case, settings: Settings) -> dict[str, Any]:
    """Return what a case takes, in this process."""
    clock = choose_clock(processor_time=settings.processor_time)
    packaged = load_packaged(case.model, case.dtype)
    prompts = prompts_of(packaged, case.set, Path(settings.prompts), settings.num_prompts)
    loads = [make_load([prompt], 0, packaged.target.device, {}) for prompt in prompts]
    sampling: dict[str, Any] = {}
    if case.temperature:
        sampling = {"do_sample": True, "temperature": case.temperature, "top_k": 0, "top_p": settings.top_p}
    way = {**make_ways(packaged, settings.draft_model)[case.way], **sampling}
    torch.manual_seed(case.run)
    # what a process does but once is nobody's
    packaged.target.generate(loads[0].token_ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    found = _in_turns(packaged.target, sampling, way, loads, settings.max_new_tokens, clock)
    # Linux counts KiB, macOS bytes
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {**found, "peak_bytes": peak, "weight_bytes": weight_bytes(packaged.target), "title": packaged.title}


def _in_turns(
    target: Any,
    plain: dict[str, Any],
    way: dict[str, Any],
    loads: list[Load],
    max_new_tokens: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    both = {PLAIN: plain, "way": way}
    measured = measure(
        target, both, loads, runs=len(STATES), max_new_tokens=max_new_tokens, clock=clock, warms_up=False
    )
    ours, theirs = measured["way"], measured[PLAIN]
    same = sum(torch.equal(*pair) for pair in zip(ours.texts, theirs.texts, strict=True))
    return {
        "ratios": ours.ratios_to(theirs),
        "speeds": ours.speeds,
        "plain_speeds": theirs.speeds,
        "tau": _tokens_per_pass(ours, len(loads)),
        "passes_per_token": sum(ours.passes) / sum(ours.tokens),
        "parts": list(ours.parts),
        "identical": [same, len(ours.texts)],
    }


def _tokens_per_pass(measured: MeasuredDrafts, num_prompts: int) -> float:
    """Return the tokens of a pass, prefills and the tokens that they give left out."""
    num_prefills = num_prompts * len(measured.passes)
    return (sum(measured.tokens) - num_prefills) / max(sum(measured.passes) - num_prefills, 1)


def measure_fresh(case: Case, settings: Settings) -> dict[str, Any]:
    """Return what a case takes, in a process of its own."""
    task = json.dumps({"case": asdict(case), "settings": asdict(settings)})
    command = [sys.executable, "-m", "benchmarks.compare", "--task", task]
    done = subprocess.run(command, cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def bandwidth(clock: Callable[[], float]) -> float:
    """Return the bytes a second that are read from memory here, at best."""
    values = torch.ones(READ // 4)
    seconds = []
    for _ in range(10):
        start = clock()
        values.sum()
        seconds.append(clock() - start)
    return READ / min(seconds)


def _split(value: str, known: Sequence[str], option: str) -> list[str]:
    """Return the comma-separated names, once each is known to be one."""
    names = [one.strip() for one in value.split(",") if one.strip()]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"must name some of {', '.join(known)}, got {name!r}.", param_hint=option)
    return names


def main(
    prompts: PromptsFile = PROMPTS,
    models: Annotated[str, typer.Option(help="Comma-separated packaged targets.")] = ",".join(PACKAGED_MODELS),
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = "bf16,fp32",
    sets: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(SETS),
    temperatures: Annotated[str, typer.Option(help="Comma-separated; 0 is greedy.")] = "0,1",
    top_p: Annotated[float, typer.Option(help="Share that is sampled from.")] = 1.0,
    ways: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of a set at most.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Fresh processes of every way and set.")] = 3,
    draft_model: Annotated[str, typer.Option(help="Folder of a small model, for assisted generation.")] = "",
    processor_time: ProcessorTime = False,
    output: Annotated[Path, typer.Option(help="Where the page goes; the figure lies beside it.")] = FOLDER
    / "results"
    / "compare.md",
    journal: Annotated[Path, typer.Option(help="Where measurements are kept.")] = Path("build/compare.jsonl"),
    task: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure what is not measured yet, print the tables, write them and the figure to files."""
    if task:
        given = json.loads(task)
        print(json.dumps(measure_case(Case(**given["case"]), Settings(**given["settings"]))))
        return
    check_plotting()
    all_ways = [AGAIN, PROMPT_LOOKUP, *([ASSISTED] if draft_model else []), DEFAULT, FIXED, LOOKUP, UNDRAFTED]
    targets = _split(models, list(PACKAGED_MODELS), "--models")
    of_dtypes, of_sets = _split(dtypes, list(DTYPES), "--dtypes"), _split(sets, SETS, "--sets")
    chosen = _split(ways, all_ways, "--ways") or all_ways
    for name in targets:
        # says what is not installed before anything is measured
        converted_target(name)
    settings = Settings(str(prompts.resolve()), num_prompts, max_new_tokens, processor_time, draft_model, top_p)
    # run by run, so that a slow hour of the machine hits all of them
    cases = [
        Case(model, dtype, float(temperature), name, way, run)
        for run, model, dtype, temperature, name, way in product(
            range(runs), targets, of_dtypes, temperatures.split(","), of_sets, chosen
        )
    ]
    here = provenance.describe_run()
    place = {**asdict(settings), "hardware": here.hardware, "commit": here.commit}
    with Journal(journal) as kept:
        records = [record for record in kept.records if record["settings"] == place]
        measured = {Case(**record["case"]) for record in records}
        for case in track([case for case in cases if case not in measured], "measuring"):
            records.append({"settings": place, "case": asdict(case), "found": measure_fresh(case, settings)})
            kept.append(records[-1])
    results = Results.of(records, cases)
    repeated = f"means over {runs} processes ± standard error" if runs > 1 else "one process each"
    told = f"Sampled from the top {top_p:g}. " if top_p < 1 else ""
    lines = [
        "# All ways side by side",
        "",
        f"Speed relative to plain `generate` in the same process, in turns with it: {repeated}, "
        f"{num_prompts} prompts x {max_new_tokens} tokens, one row; cold with nothing learnt, "
        f"then warm. Questions from `{prompts.name}`. {told}Tau: tokens of a target pass, prefills left out. "
        "Draft, verify and rest are shares of the rounds' time. Peak memory is the process's, plain included. Sampled "
        "texts differ.",
        "",
        f"![speed relative to plain]({output.stem}.png)",
        "",
        *describe_run(),
        *results.lines(bandwidth(choose_clock(processor_time=processor_time))),
    ]
    Console().print(write_page(lines, output), markup=False, soft_wrap=True)
    write_whole(output.with_suffix(".png"), draw(results))


if __name__ == "__main__":
    typer.run(main)
