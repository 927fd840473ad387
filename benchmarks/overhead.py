"""What a round costs beside the two models, and how fast decoding is against plain `generate` and prompt lookup.

    python -m benchmarks.overhead --prompts FILE.jsonl

All ways answer the same prompts in turns, so that a slow minute of the machine hits all of them. Absolute speeds
belong to the machine; the table holds ratios.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

from benchmarks.loading import DTYPES, PROMPTS, PromptsFile
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf import DSparkAssistantModel
from dspark_hf.demo.comparison import Answer, answer, encode_prompt
from dspark_hf.demo.packaged import PACKAGED_MODELS, converted_target, shipped_drafter

NUM_DRAFTS = (2, 3, 5, 7)
PROMPT_LOOKUP_TOKENS = 5


@dataclass
class Way:
    """One way to decode: its name, its arguments of `generate`, and its answers, one list per run."""

    name: str
    options: dict[str, Any]
    runs: list[list[Answer]] = field(default_factory=list)

    def seconds_per_token(self) -> list[float]:
        """Return the time per token of every run."""
        return [sum(one.seconds for one in run) / sum(len(one.token_ids) for one in run) for run in self.runs]

    def tokens_per_pass(self) -> float:
        """Return how many tokens a pass of the target yields, the prefill's included."""
        return sum(len(one.token_ids) for one in self.runs[0]) / sum(one.num_target_passes for one in self.runs[0])


@dataclass
class RoundCost:
    """Milliseconds per round: in the drafter, in the target, and in everything else."""

    draft: float
    verify: float
    other: float

    @property
    def overhead(self) -> float:
        """Share of the round that is neither the drafter's forward nor the target's."""
        return self.other / (self.draft + self.verify + self.other)


def read_prompts(path: Path, count: int) -> list[str]:
    """Return the first user turn of the first `count` lines, each `{"turns": [...]}`."""
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["turns"][0] for line in lines]


def build_ways(drafter: DSparkAssistantModel) -> list[Way]:
    """Return plain decoding first, then what is compared with it."""
    lookup = Way(f"prompt lookup, {PROMPT_LOOKUP_TOKENS} tokens", {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS})
    dspark = [
        Way(
            f"DSpark, {count} drafts",
            {"assistant_model": drafter, "num_assistant_tokens": count, "scheduler": "fixed", "drafts": "model"},
        )
        for count in NUM_DRAFTS
        if count <= drafter.block_size
    ]
    return [Way("plain", {}), lookup, *dspark]


def measure(target: Any, ways: Sequence[Way], prompts: Sequence[BatchEncoding], num_runs: int, length: int) -> None:
    """Answer every prompt every way, `num_runs` times; fills the ways' runs."""
    for way in ways:
        answer(target, prompts[0], max_new_tokens=8, **way.options)
        way.runs = [[] for _ in range(num_runs)]
    turns = [(run, inputs) for run in range(num_runs) for inputs in prompts]
    for turn, (run, inputs) in enumerate(track(turns, "Measuring", transient=True)):
        # another way goes first each time
        first = turn % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            way.runs[run].append(answer(target, inputs, max_new_tokens=length, **way.options))


def round_cost(way: Way) -> RoundCost | None:
    """Return the median cost of a round over the runs, or None for a way without statistics."""
    costs = []
    for run in way.runs:
        all_statistics = [one.statistics for one in run if one.statistics is not None]
        num_rounds = sum(statistics.num_rounds for statistics in all_statistics)
        if not num_rounds:
            return None
        totals = [
            sum(getattr(statistics, f"{part}_seconds") for statistics in all_statistics)
            for part in ("draft", "verify", "other")
        ]
        costs.append([1000 * total / num_rounds for total in totals])
    return RoundCost(*(median(parts) for parts in zip(*costs, strict=True)))


def table(ways: Sequence[Way]) -> list[str]:
    """Return the Markdown table of one dtype."""
    plain = ways[0]
    lines = [
        "| way | speed, plain = 1 | lowest to highest run | tokens per target pass | identical answers "
        "| round: draft + verify + other, ms | overhead |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way in ways:
        pairs = zip(plain.seconds_per_token(), way.seconds_per_token(), strict=True)
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        same = [
            one.token_ids == reference.token_ids for one, reference in zip(way.runs[0], plain.runs[0], strict=True)
        ]
        cost = round_cost(way)
        parts = "" if cost is None else f"{cost.draft:.1f} + {cost.verify:.1f} + {cost.other:.1f}"
        share = "" if cost is None else f"{cost.overhead:.1%}"
        lines.append(
            f"| {way.name} | {median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} | {way.tokens_per_pass():.2f} "
            f"| {sum(same)} of {len(same)} | {parts} | {share} |"
        )
    return lines


def main(
    prompts: PromptsFile = PROMPTS,
    num_prompts: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Runs whose median counts.")] = 3,
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = "fp32,bf16",
    target: Annotated[str | None, typer.Option(help="Default: the packaged SmolLM2.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Default: the shipped drafter.")] = None,
    output: Annotated[Path, typer.Option(help="Where the table goes.")] = FOLDER / "results" / "overhead.md",
) -> None:
    """Measure, print the tables and write them to a file."""
    model = PACKAGED_MODELS["smollm2"]
    drafter_folder = drafter or shipped_drafter(model)
    target_folder = target or converted_target("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    inputs = [encode_prompt(tokenizer, prompt) for prompt in read_prompts(prompts, num_prompts)]
    lines = [
        "# Overhead of a round, and speed",
        "",
        f"{Path(target).name if target else model.title}, batch size 1, greedy, {len(inputs)} prompts of "
        f"`{prompts.name}`, {max_new_tokens} new tokens at most, medians of {runs} interleaved runs.",
        "",
        *describe_run(),
    ]
    for name in dtypes.split(","):
        loaded_target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=DTYPES[name])
        loaded_drafter = DSparkAssistantModel.from_pretrained(drafter_folder, dtype=DTYPES[name])
        ways = build_ways(loaded_drafter)
        measure(loaded_target, ways, inputs, runs, max_new_tokens)
        lines += ["", f"## {name}", "", *table(ways)]
    print(write_page(lines, output))


if __name__ == "__main__":
    typer.run(main)
