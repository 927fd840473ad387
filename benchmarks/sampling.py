"""What sampling costs a block of drafts, what the Markov head costs, and what each choice costs in accepted drafts.

    python -m benchmarks.sampling --model smollm2

Costs are processor time on one thread, of blocks after the same context, in turns; accepted lengths are counted, on
the same prompts and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, Any

import torch
import typer
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from benchmarks import loading
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf import DSparkAssistantModel, DSparkConfig
from dspark_hf.generation.call.rows import CallRows
from dspark_hf.generation.drafting.chain import sample_block
from dspark_hf.generation.drafting.interface import Sampler
from dspark_hf.generation.slots import SlotSampler
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.heads import build_markov_head
from dspark_hf.prompts import Prompt, encode_prompt, read_prompts

# vocabulary and rank of heads over all tokens: SmolLM2's, DeepSpec's released drafters for Qwen3, Gemma's
FULL_HEADS = {"49k, rank 64": (49_152, 64), "151k, rank 256": (151_936, 256), "262k, rank 256": (262_144, 256)}
BLOCK_SIZE = 7
WIDTH = 64


def samplers(target: Any) -> dict[str, Sampler]:
    """Return how a slot's draft is drawn: greedy, and sampled at temperature 1 by either rule, and from the top 50."""
    kinds: dict[str, tuple[bool, dict[str, Any], bool]] = {
        "greedy": (False, {}, False),
        "T = 1": (True, {"top_k": 0}, False),
        "T = 1, top 50": (True, {"top_k": 50}, False),
        "T = 1, invariant": (True, {"top_k": 0}, True),
    }
    found: dict[str, Sampler] = {}
    for name, (is_sampling, warpers, is_invariant) in kinds.items():
        config = GenerationConfig(do_sample=is_sampling, max_length=1000, **warpers)
        chain = target._get_logits_processor(config) if is_sampling else LogitsProcessorList()
        rows = CallRows(
            torch.tensor([[1, 2, 3]]),
            config,
            chain,
            StoppingCriteriaList(),
            None,
            num_drafts=7,
            returns_cache=False,
            is_invariant=is_invariant,
        )
        found[name] = SlotSampler(rows, wants_margins=False)
    return found


def seconds_in_turns(
    ways: Mapping[str, Callable[[], Any]], clock: Callable[[], float], turns: int
) -> dict[str, float]:
    """Return the median time of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            start = clock()
            way()
            # the first turn warms up
            if turn:
                times[name].append(clock() - start)
    return {name: median(values) for name, values in times.items()}


def block_costs(packaged: loading.Packaged, clock: Callable[[], float], turns: int) -> dict[str, float]:
    """Return the time of a whole block of the shipped drafter, by how it is drawn."""
    drafter, target = packaged.drafter, packaged.target
    adapter = TargetAdapter(target, drafter.target_layer_ids)
    width = drafter.config.hidden_size * len(drafter.target_layer_ids)
    context = drafter.start(adapter, 1)
    context.extend(torch.randn(1, 64, width, dtype=drafter.dtype), torch.arange(64)[None], [64])
    anchor, position = torch.tensor([5]), torch.tensor([64])

    def block(sampler: Sampler) -> Callable[[], Any]:
        return lambda: context.draft(anchor, position, drafter.block_size, sampler)

    return seconds_in_turns({name: block(one) for name, one in samplers(target).items()}, clock, turns)


def head_costs(size: int, rank: int, clock: Callable[[], float], turns: int, target: Any) -> dict[str, float]:
    """Return the time of the sequential part over a full vocabulary, by how it is drawn and how many are corrected."""
    config = DSparkConfig(vocab_size=size, hidden_size=WIDTH, num_attention_heads=2, markov_rank=rank)
    head = build_markov_head(config)
    base, states, anchor = torch.randn(1, BLOCK_SIZE, size), torch.randn(1, BLOCK_SIZE, WIDTH), torch.tensor([5])

    def chain(sampler: Sampler, top: int | None) -> Callable[[], Any]:
        return lambda: sample_block(base, states, anchor, sampler, markov_head=head, vocab_size=size, markov_top_k=top)

    ways = {
        f"{name}, {top or 'all'}": chain(sampler, top)
        for name, sampler in samplers(target).items()
        for top in (None, 16, 64)
    }
    return seconds_in_turns(ways, clock, turns)


@torch.no_grad()
def accepted_lengths(
    packaged: loading.Packaged,
    texts: list[Prompt],
    max_new_tokens: int,
    options: dict[str, Any],
    drafter: DSparkAssistantModel,
) -> list[float]:
    """Return the tokens per round of every prompt."""
    lengths = []
    for number, text in enumerate(texts):
        ids = encode_prompt(text, packaged.tokenizer).view(1, -1)
        torch.manual_seed(number)
        packaged.target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            assistant_model=drafter,
            scheduler="fixed",
            drafts="model",
            **options,
        )
        statistics: Any = drafter.last_statistics
        lengths.append(1 + statistics.num_accepted / max(statistics.num_rounds, 1))
    return lengths


def lengths_table(packaged: loading.Packaged, texts: list[Prompt], max_new_tokens: int, tops: list[int]) -> list[str]:
    """Return the table of accepted lengths: greedy and sampled, by either rule, and by how many are corrected."""
    lines = ["| drawn | " + " | ".join(f"{top or 'all'} corrected" for top in tops) + " |"]
    lines.append("| --- |" + " ---: |" * len(tops))
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "T = 1, usual rule": sampled,
        "T = 1, invariant": {**sampled, "sampling": "invariant"},
    }
    for name, options in kinds.items():
        cells = []
        for top in tops:
            packaged.drafter.config.markov_top_k = top
            values = accepted_lengths(packaged, texts, max_new_tokens, options, packaged.drafter)
            cells.append(f"{mean(values):.3f} ± {stdev(values) / len(values) ** 0.5:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    packaged.drafter.config.markov_top_k = None
    return lines


def main(
    model: loading.PackagedName = "smollm2",
    dtype: loading.DtypeName = "fp32",
    prompts: loading.PromptsFile = loading.PROMPTS,
    num_prompts: Annotated[int, typer.Option(min=2)] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    turns: Annotated[int, typer.Option(min=1)] = 15,
    output: Annotated[Path | None, typer.Option(help="Where the tables go.")] = None,
) -> None:
    """Measure, print the tables and write them to a file."""
    clock = loading.choose_clock(processor_time=True)
    packaged = loading.load_packaged(model, dtype)
    lines = [f"# What sampling costs: {packaged.title}, {dtype}", "", *describe_run(), ""]
    with torch.no_grad():
        costs = block_costs(packaged, clock, turns)
        lines += ["## A block of the shipped drafter", "", "| drawn | greedy = 1 | ms |", "| --- | ---: | ---: |"]
        lines += [f"| {name} | {one / costs['greedy']:.2f} | {1000 * one:.1f} |" for name, one in costs.items()]
        for title, (size, rank) in FULL_HEADS.items():
            found = head_costs(size, rank, clock, max(turns // 3, 3), packaged.target)
            lines += ["", f"## The sequential part over a full vocabulary: {title}", ""]
            lines += ["| drawn, tokens corrected | ms a block |", "| --- | ---: |"]
            lines += [f"| {name} | {1000 * one:.1f} |" for name, one in found.items()]
    texts = read_prompts(prompts, num_prompts)
    lines += ["", f"## Tokens per round, {len(texts)} prompts, {max_new_tokens} new tokens at most", ""]
    lines += lengths_table(packaged, texts, max_new_tokens, [0, 16, 64])
    print(write_page(lines, output or FOLDER / "results" / f"sampling-{model}.md"))


if __name__ == "__main__":
    typer.run(main)
