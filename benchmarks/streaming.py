"""Requests of different lengths: one by one, in batches that wait for their longest row, and as a stream.

    python -m benchmarks.streaming --prompts questions.jsonl

All ways answer the same requests in turns, another one first each time. A request's time is that from the start, when
all requests are there, until its text is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import loading
from benchmarks.loads import make_load
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf import Request, generate_stream
from dspark_hf.evaluation.measuring import until_end
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.prompts import encode_prompt, read_prompts

# new tokens of the shortest requests
SHORTEST = 8
# whose texts the others must equal
ALONE = "one by one"
Text = list[int]


@dataclass
class Run:
    """One way's answers to all requests: the text and the time of each, in the order of the requests."""

    texts: list[Text] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The time until all were answered."""
        return max(self.times)

    @property
    def num_tokens(self) -> int:
        """New tokens of all requests."""
        return sum(map(len, self.texts))


class Ways:
    """The ways to answer requests; each is called with requests and a clock.

    Args:
        target: the target.
        drafter: the drafter.
        max_rows: rows of a batch, and of the stream.
    """

    def __init__(self, target: Any, drafter: Drafter, max_rows: int):
        self._target = target
        self._drafter = drafter
        self._max_rows = max_rows

    def by_name(self) -> dict[str, Callable[[list[Request], Callable[[], float]], Run]]:
        """Return all ways."""
        return {
            ALONE: lambda requests, clock: self._batches(requests, clock, 1, {}),
            "batches": lambda requests, clock: self._batches(requests, clock, self._max_rows, {}),
            "batches, drafter": lambda requests, clock: self._batches(
                requests, clock, self._max_rows, {"assistant_model": self._drafter}
            ),
            "stream, drafter": self._stream,
        }

    def _batches(
        self, requests: list[Request], clock: Callable[[], float], num_rows: int, options: dict[str, Any]
    ) -> Run:
        ends = self._target.generation_config.eos_token_id
        run, start = Run(), clock()
        for batch in (requests[first : first + num_rows] for first in range(0, len(requests), num_rows)):
            lengths = [request.options["max_new_tokens"] for request in batch]
            load = make_load([torch.tensor(one.input_ids) for one in batch], 0, self._target.device, {})
            output = self._target.generate(
                load.token_ids,
                attention_mask=load.attention_mask,
                max_new_tokens=max(lengths),
                do_sample=False,
                pad_token_id=0,
                **options,
            )
            rows = output[:, load.token_ids.shape[1] :].tolist()
            run.texts += [list(until_end(row[:length], ends)) for row, length in zip(rows, lengths, strict=True)]
            run.times += [clock() - start] * len(batch)
        return run

    def _stream(self, requests: list[Request], clock: Callable[[], float]) -> Run:
        texts: dict[Any, Text] = {}
        times: dict[Any, float] = {}
        start = clock()
        for finished in generate_stream(self._target, requests, drafter=self._drafter, max_rows=self._max_rows):
            if finished.error is not None:
                raise finished.error
            key = finished.request.key
            times[key] = clock() - start
            assert finished.token_ids is not None
            texts[key] = finished.token_ids[len(finished.request.input_ids) :].tolist()
        return Run([texts[one.key] for one in requests], [times[one.key] for one in requests])


def make_requests(prompts: Sequence[Sequence[int]], longest: int, seed: int) -> list[Request]:
    """Return greedy requests of random lengths up to `longest` new tokens."""
    draw = random.Random(seed)
    return [
        Request(prompt, {"max_new_tokens": draw.randint(SHORTEST, longest), "do_sample": False}, key)
        for key, prompt in enumerate(prompts)
    ]


def table(runs: dict[str, list[Run]], reference: str) -> list[str]:
    """Return the table: speed and mean time of a request against those of `reference`, run by run."""
    lines = [
        f"| way | tokens/s | speed, {reference} = 1 | mean time of a request, {reference} = 1 | identical |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, ours in runs.items():
        pairs = list(zip(ours, runs[reference], strict=True))
        speed = median(one.num_tokens / one.seconds * (other.seconds / other.num_tokens) for one, other in pairs)
        times = median(mean(one.times) / mean(other.times) for one, other in pairs)
        same = [
            text == expected
            for one, alone in zip(ours, runs[ALONE], strict=True)
            for text, expected in zip(one.texts, alone.texts, strict=True)
        ]
        rate = median(one.num_tokens / one.seconds for one in ours)
        lines.append(f"| {way} | {rate:.1f} | {speed:.2f} | {times:.2f} | {sum(same)} of {len(same)} |")
    return lines


def main(
    prompts: loading.PromptsFile = loading.PROMPTS,
    model: loading.PackagedName = "smollm2",
    num_requests: Annotated[int, typer.Option(min=2, help="Requests of a run.")] = 24,
    max_rows: Annotated[int, typer.Option(min=2, help="Rows of a batch, and of the stream.")] = 8,
    longest: Annotated[int, typer.Option(min=SHORTEST, help="New tokens of a request at most.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Runs whose median counts.")] = 3,
    dtype: loading.DtypeName = "fp32",
    processor_time: loading.ProcessorTime = False,
    output: Annotated[Path, typer.Option(help="Where the table goes.")] = FOLDER / "results" / "streaming.md",
) -> None:
    """Measure, print the table and write it to a file."""
    clock = loading.choose_clock(processor_time=processor_time)
    packaged = loading.load_packaged(model, dtype)
    encoded = [encode_prompt(prompt, packaged.tokenizer).flatten().tolist() for prompt in read_prompts(prompts)]
    ways = Ways(packaged.target, packaged.drafter, max_rows).by_name()
    measured: dict[str, list[Run]] = {way: [] for way in ways}
    console = Console()
    for run in range(-1, runs):
        start = max(run, 0) * num_requests
        chosen = [encoded[(start + index) % len(encoded)] for index in range(num_requests)]
        # the first run warms up, with few requests
        requests = make_requests(chosen if run >= 0 else chosen[:max_rows], longest, seed=run)
        first = run % len(ways)
        for way in [*list(ways)[first:], *list(ways)[:first]]:
            with console.status(f"run {run + 1} of {runs}: {way}"):
                answered = ways[way](requests, clock)
            if run >= 0:
                measured[way].append(answered)
    seconds = loading.time_word(processor_time=processor_time)
    lines = [
        f"# Requests of different lengths: {packaged.title}, {dtype}",
        "",
        f"{num_requests} greedy requests of {SHORTEST} to {longest} new tokens, all there from the start, {max_rows} "
        f"rows; medians of {runs} interleaved runs; {seconds}. A batch is over when its longest row is; the stream "
        "takes the next request when a row is free.",
        "",
        *describe_run(),
        "",
        *table(measured, "batches"),
    ]
    console.print(write_page(lines, output), markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
