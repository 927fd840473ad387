"""What a target's pass costs on a CPU, by its number of tokens, with weights as they were loaded and packed.

    python -m benchmarks.packing

One row behind a context, both in turns, medians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.loading import ProcessorTime, choose_clock, load_packaged, time_word, weight_bytes
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf.demo.packaged import PACKAGED_MODELS
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.packing import forget_packed, pack_weights, packed_weights

WIDTHS = (1, 2, 4, 8, 16, 24)
WAYS = ("as loaded", "packed")


def time_passes(target: Any, ids: Tensor, width: int, clock: Callable[[], float], repeats: int) -> dict[str, float]:
    """Return the seconds of a pass over the first `width` of `ids` `(1, T)` behind all of them, by way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with torch.no_grad():
        cache = target(ids, use_cache=True)[CACHE_KEY]
        # the first pass of a shape makes its kernels
        for turn in range(1 + repeats):
            for way in WAYS:
                with packed_weights(*([target] if way == WAYS[1] else [])):
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


def table(title: str, found: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """Return the rows of a target's table, from seconds by dtype, width and way."""
    rows = []
    for dtype, widths in found.items():
        for way in WAYS:
            values = " | ".join(f"{1000 * by_way[way]:.0f}" for by_way in widths.values())
            rows.append(f"| {title}, {dtype} | {way} | {values} |")
    return rows


def _head(widths: Sequence[int]) -> list[str]:
    names = " | ".join(map(str, widths))
    return [f"| tokens of a pass | weights | {names} |", "| --- | --- |" + " ---: |" * len(widths)]


def main(
    models: Annotated[str, typer.Option(help="Comma-separated packaged targets.")] = ",".join(PACKAGED_MODELS),
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = "bf16,fp32",
    context: Annotated[int, typer.Option(min=32, help="Tokens before the pass.")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    processor_time: ProcessorTime = False,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = FOLDER / "results" / "packing.md",
) -> None:
    """Measure, print the table and write it to a file."""
    clock = choose_clock(processor_time=processor_time)
    rows, notes = [], []
    for name in models.split(","):
        found: dict[str, dict[int, dict[str, float]]] = {}
        for dtype in dtypes.split(","):
            packaged = load_packaged(name, dtype)
            target = packaged.target
            packing, checking = time_packing(target, clock)
            notes.append(
                f"- {packaged.title}, {dtype}: {weight_bytes(target) / 2**20:.0f} MB of weights are packed in "
                f"{packing:.2f} s, and checked in {1000 * checking:.0f} ms."
            )
            ids = torch.randint(
                5,
                target.get_input_embeddings().num_embeddings,
                (1, context),
                generator=torch.Generator().manual_seed(0),
            )
            found[dtype] = {width: time_passes(target, ids, width, clock, repeats) for width in WIDTHS}
        rows += table(packaged.title, found)
    lines = [
        "# Packed weights",
        "",
        f"Milliseconds of a target's pass behind {context} tokens, one row, by the number of its tokens: medians of "
        f"{repeats}, both in turns; {time_word(processor_time=processor_time)}.",
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
