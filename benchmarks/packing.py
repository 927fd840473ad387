"""What a target's pass costs on a CPU, by its number of tokens: as Transformers makes it, and as our calls do.

    python -m benchmarks.packing

These multiply with packed weights, and attend by groups of heads. One row behind a context, all in turns, medians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache

from benchmarks.loading import ProcessorTime, choose_clock, load_packaged, time_word, weight_bytes
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf.demo.packaged import PACKAGED_MODELS
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.lean_passes import lean_passes
from dspark_hf.generation.packing import forget_packed, pack_weights, packed_weights

WIDTHS = (1, 2, 4, 8, 16, 24)
PLAIN, PACKED, GROUPED = "as loaded", "packed", "packed, heads in groups"
WAYS = (PLAIN, PACKED, GROUPED)


def time_passes(target: Any, ids: Tensor, width: int, clock: Callable[[], float], repeats: int) -> dict[str, float]:
    """Return the seconds of a pass over the first `width` of `ids` `(1, T)` behind all of them, by way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with torch.no_grad():
        cache = DynamicCache(config=target.config)
        # windows forget what a pass is taken back to otherwise
        cache.activate_past_recording()
        target(ids, use_cache=True, logits_to_keep=1, **{CACHE_KEY: cache})
        cache.crop(0)
        # the first pass of a shape makes its kernels
        for turn in range(1 + repeats):
            for way in WAYS:
                heads = lean_passes() if way == GROUPED else nullcontext()
                with packed_weights(*([] if way == PLAIN else [target])), heads:
                    start = clock()
                    target(ids[:, :width], use_cache=True, **{CACHE_KEY: cache})
                    took = clock() - start
                cache.crop(-width)
                if turn:
                    seconds[way].append(took)
    return {way: median(values) for way, values in seconds.items()}


def time_packing(target: Any, clock: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds that packing takes, and finding that nothing has changed."""
    forget_packed()
    marks = [clock()]
    for _ in range(2):
        pack_weights(target)
        marks.append(clock())
    return marks[1] - marks[0], marks[2] - marks[1]


def table(title: str, dtype: str, found: dict[int, dict[int, dict[str, float]]]) -> list[str]:
    """Return the rows of a target's table, from seconds by context, width and way."""
    rows = []
    for context, widths in found.items():
        for way in WAYS:
            values = " | ".join(f"{1000 * by_way[way]:.0f}" for by_way in widths.values())
            rows.append(f"| {title}, {dtype} | {context} | {way} | {values} |")
    return rows


def _head(widths: Sequence[int]) -> list[str]:
    names = " | ".join(map(str, widths))
    return [f"| tokens of a pass | behind | weights | {names} |", "| --- | ---: | --- |" + " ---: |" * len(widths)]


def _random_ids(target: Any, length: int) -> Tensor:
    vocab_size = target.get_input_embeddings().num_embeddings
    return torch.randint(5, vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def main(
    models: Annotated[str, typer.Option(help="Comma-separated packaged targets.")] = ",".join(PACKAGED_MODELS),
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = "bf16,fp32",
    contexts: Annotated[str, typer.Option(help="Comma-separated: tokens before the pass, 32 or more.")] = "64,2048",
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    processor_time: ProcessorTime = False,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = FOLDER / "results" / "packing.md",
) -> None:
    """Measure, print the table and write it to a file."""
    clock = choose_clock(processor_time=processor_time)
    rows, notes = [], []
    for name in models.split(","):
        for dtype in dtypes.split(","):
            packaged = load_packaged(name, dtype)
            target = packaged.target
            packing, checking = time_packing(target, clock)
            notes.append(
                f"- {packaged.title}, {dtype}: {weight_bytes(target) / 2**20:.0f} MB of weights are packed in "
                f"{packing:.2f} s, and checked in {1000 * checking:.0f} ms."
            )
            found: dict[int, dict[int, dict[str, float]]] = {}
            for context in map(int, contexts.split(",")):
                ids = _random_ids(target, context)
                found[context] = {width: time_passes(target, ids, width, clock, repeats) for width in WIDTHS}
            rows += table(packaged.title, dtype, found)
    lines = [
        "# Passes on a processor",
        "",
        "Milliseconds of a target's pass behind a context, one row, by the number of its tokens: medians of "
        f"{repeats}, all in turns; {time_word(processor_time=processor_time)}.",
        "",
        *describe_run(),
        "",
        *_head(WIDTHS),
        *rows,
        "",
        *notes,
    ]
    print(write_page(lines, output))


if __name__ == "__main__":
    typer.run(main)
