"""Speed of drafts that are looked up, beside the drafter's, both together and Transformers' prompt lookup.

    python -m benchmarks.lookup --processor-time

Each set is decoded in all ways in turns, another one first each time, so that a slow minute of the machine hits all of
them. Functions to complete and to edit are Python's own; questions come from a file of prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks import loading
from benchmarks.loads import Load, Measured, make_load, num_new_tokens
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf import LookupAssistant
from dspark_hf.generation.scheduling import reset_learned_state
from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.prompts import encode_prompt, read_prompts, user_turn

PLAIN = "plain"
# what Transformers' own documentation uses
PROMPT_LOOKUP_TOKENS = 10
# modules whose functions are short, and say what they do
MODULES = ("textwrap", "bisect", "heapq", "statistics", "shlex", "fnmatch", "colorsys", "calendar", "difflib")
FUNCTION_LENGTHS = range(400, 1200)
EDIT = "Add type hints to this function. Answer with the whole function and nothing else.\n\n{code}"
COPY = "Repeat this text word for word:\n\n{text}"
CHAT = (
    "What is photosynthesis, and why does it matter for life on Earth?",
    "Write a polite email that asks a colleague to move tomorrow's meeting to Friday.",
    "List five tips for learning a new language.",
    "Tell me about the history of the bicycle.",
    "Why do leaves change their colour in autumn?",
    "Write a short poem about the sea.",
)


@dataclass
class MeasuredDrafts(Measured):
    """Runs of one way over one set, with the target passes of each, texts, drafts by source, and parts of the time."""

    passes: list[int] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)
    drafts: dict[str, tuple[int, int]] = field(default_factory=dict)
    # seconds of rounds: in the drafter, in the target, in the rest
    parts: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def count(self, statistics: SpeculationStatistics) -> None:
        """Add a run: how many drafts were verified and accepted, and where the time went."""
        new = statistics.draft_seconds, statistics.verify_seconds, statistics.other_seconds
        self.parts = tuple(old + more for old, more in zip(self.parts, new, strict=True))  # type: ignore[assignment]
        for name, counts in statistics.by_source.items():
            verified, accepted = self.drafts.get(name, (0, 0))
            self.drafts[name] = verified + counts.num_verified, accepted + counts.num_accepted


def functions(count: int) -> list[str]:
    """Return the source of `count` functions of the standard library, a module's first ones before all others'."""
    found = []
    for name in MODULES:
        module = import_module(name)
        own = [one for one in vars(module).values() if inspect.isfunction(one) and one.__module__ == name]
        found += [source for source in map(inspect.getsource, own) if len(source) in FUNCTION_LENGTHS]
    return found[:count]


def make_sets(packaged: loading.Packaged, prompts: Path, count: int) -> dict[str, list[Tensor]]:
    """Return the encoded prompts of every set, at most `count` of each."""
    tokenizer = packaged.tokenizer

    def ask(text: str) -> Tensor:
        # a tokenizer without a chat template gets the text alone
        return encode_prompt(user_turn(text), tokenizer)

    code = functions(count)
    questions = [prompt.messages[0]["content"] for prompt in read_prompts(prompts, count) if prompt.messages]
    heads = [source[: len(source) // 2] for source in code]
    return {
        "questions": [ask(text) for text in questions[:count]],
        "chat": [ask(text) for text in CHAT[:count]],
        "code completion": [tokenizer(head, return_tensors="pt").input_ids[0] for head in heads],
        "editing": [ask(EDIT.format(code=source)) for source in code],
        "copying": [ask(COPY.format(text=inspect.cleandoc(source))) for source in code],
    }


def make_ways(packaged: loading.Packaged, wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Return what `generate` is told, by way."""
    ways: dict[str, dict[str, Any]] = {
        PLAIN: {},
        "drafts=model": {"assistant_model": packaged.drafter, "drafts": "model"},
        "LookupAssistant": {"assistant_model": LookupAssistant()},
        "drafts=both": {"assistant_model": packaged.drafter, "drafts": "both"},
        "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS},
    }
    return {name: options for name, options in ways.items() if not wanted or name in (PLAIN, *wanted)}


def measure(
    target: Any,
    ways: dict[str, dict[str, Any]],
    loads: list[Load],
    *,
    runs: int,
    max_new_tokens: int,
    clock: Callable[[], float],
    warms_up: bool = True,
) -> dict[str, MeasuredDrafts]:
    """Return what every way took over the set, run by run; what is learned in a run is kept for the next.

    With `warms_up` another run goes before, which does not count.
    """
    measured = {way: MeasuredDrafts() for way in ways}
    for run in range(-1 if warms_up else 0, runs):
        for index, load in enumerate(loads):
            first = (run * len(loads) + index) % len(ways)
            for way in [*list(ways)[first:], *list(ways)[:first]]:
                seconds, new, passes = _answer(target, load, ways[way], max_new_tokens, clock)
                if run >= 0:
                    _add(measured[way], run, seconds, new, passes, target, ways[way].get("assistant_model"))
    return measured


def _answer(
    target: Any, load: Load, options: dict[str, Any], max_new_tokens: int, clock: Callable[[], float]
) -> tuple[float, Tensor, int]:
    passes: list[None] = []
    hook = target.register_forward_hook(lambda *_: passes.append(None))
    try:
        start = clock()
        output = target.generate(
            load.token_ids,
            attention_mask=load.attention_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
            **{"do_sample": False, **options},
        )
        return clock() - start, output[:, load.token_ids.shape[1] :], len(passes)
    finally:
        hook.remove()


def _add(
    measured: MeasuredDrafts, run: int, seconds: float, new: Tensor, passes: int, target: Any, drafter: Any
) -> None:
    if len(measured.seconds) <= run:
        measured.seconds.append(0.0)
        measured.tokens.append(0)
        measured.passes.append(0)
    measured.seconds[run] += seconds
    measured.tokens[run] += num_new_tokens(new, target.generation_config.eos_token_id)
    measured.passes[run] += passes * len(new)
    measured.texts.append(new)
    # a small model of Transformers, for its own assisted generation, has none
    statistics = getattr(drafter, "last_statistics", None)
    if statistics is not None:
        measured.count(statistics)


def table(measured: dict[str, MeasuredDrafts]) -> list[str]:
    """Return the table of one set."""
    lines = [
        "| way | tokens/s | speed, plain = 1 | lowest to highest run | tokens per pass and row "
        "| model: accepted of verified | lookup: accepted of verified | identical |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    plain = measured[PLAIN]
    for way, ours in measured.items():
        ratios = sorted(ours.ratios_to(plain))
        same = sum(torch.equal(*pair) for pair in zip(ours.texts, plain.texts, strict=True))
        drafts = [_drafts(ours.drafts.get(source, (0, 0))) for source in ("model", "lookup")]
        lines.append(
            f"| {way} | {ours.speed:.1f} | {median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} "
            f"| {sum(ours.tokens) / sum(ours.passes):.2f} | {' | '.join(drafts)} | {same} of {len(ours.texts)} |"
        )
    return lines


def _drafts(counts: tuple[int, int]) -> str:
    verified, accepted = counts
    return f"{accepted} of {verified}" if verified else ""


def main(
    prompts: loading.PromptsFile = loading.PROMPTS,
    model: loading.PackagedName = "smollm2",
    sets: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    ways: Annotated[str, typer.Option(help="Comma-separated, besides plain; default: all.")] = "",
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of a set at most.")] = 6,
    rows: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Runs whose median counts.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    dtype: loading.DtypeName = "bf16",
    processor_time: loading.ProcessorTime = False,
    output: Annotated[Path | None, typer.Option(help="Where the page goes.")] = None,
) -> None:
    """Measure, print the tables and write them to a file."""
    clock, console = loading.choose_clock(processor_time=processor_time), Console()
    packaged = loading.load_packaged(model, dtype)
    reset_learned_state()
    seconds = loading.time_word(processor_time=processor_time)
    lines = [
        f"# Drafts that are looked up: {packaged.title}, {dtype}",
        "",
        f"Greedy, {rows} rows, {max_new_tokens} new tokens at most, {num_prompts} prompts a set at most; medians of "
        f"{runs} interleaved runs, a first one for warming up left out; {seconds}.",
        "",
        *describe_run(),
    ]
    for name, encoded in make_sets(packaged, prompts, num_prompts).items():
        if sets and name not in sets.split(","):
            continue
        batches = [encoded[start : start + rows] for start in range(0, len(encoded), rows)]
        loads = [make_load(batch, 0, packaged.target.device, {}) for batch in batches]
        chosen = make_ways(packaged, [way for way in ways.split(",") if way])
        with console.status(name):
            measured = measure(packaged.target, chosen, loads, runs=runs, max_new_tokens=max_new_tokens, clock=clock)
        lines += ["", f"## {name}", "", *table(measured)]
        console.print("\n".join([name, *table(measured)]), markup=False, soft_wrap=True)
    write_page(lines, output or FOLDER / "results" / f"lookup-{model}-{dtype}.md")


if __name__ == "__main__":
    typer.run(main)
