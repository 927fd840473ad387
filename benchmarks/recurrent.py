"""What a verify pass over a target with recurrent layers costs, and what taking back half of it does.

python -m benchmarks.recurrent

Random weights in the shape of Qwen3.5-0.8B, three Gated DeltaNet layers to one of full attention; 24 layers are the
whole, 8 have the same ratios. The vocabulary is small, since its head only dilutes. Passes of all widths take turns,
so that a slow moment of the machine hits all.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache, GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from benchmarks.loading import DTYPES
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.choosing import choose_target
from dspark_hf.generation.targets.recurrent_support import can_recompute

WIDTHS = (1, 2, 4, 8, 16)
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}


def build(dtype: torch.dtype, **options: Any) -> TargetAdapter:
    """Return a target with random weights, its recurrences seen by whoever rolls them back."""
    torch.manual_seed(0)
    model: Any = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**SHAPE, **options}))
    model = model.to(dtype).eval()
    assert can_recompute(model)
    return TargetAdapter(model, [1])


@torch.no_grad()
def measure(adapter: TargetAdapter, context: int, repeats: int) -> dict[int, tuple[float, float]]:
    """Return by width the seconds of a pass, and of taking back half of its tokens."""
    times: dict[int, list[tuple[float, float]]] = {width: [] for width in WIDTHS}
    prompt = torch.randint(0, adapter.vocab_size, (1, context))
    with adapter:
        cache = DynamicCache(config=adapter.config)
        target = choose_target(adapter, prompt, GenerationConfig(), {CACHE_KEY: cache}, widest=max(WIDTHS))
        target.prefill()
        for turn in range(repeats + 1):
            for width in WIDTHS:
                token_ids = torch.randint(0, adapter.vocab_size, (1, width))
                start = perf_counter()
                target.verify(token_ids)
                middle = perf_counter()
                target.keep([range(max(width // 2, 1))])
                # kernels are chosen in the first turn
                if turn:
                    times[width].append((middle - start, perf_counter() - middle))
    return {width: tuple(median(part) for part in zip(*seconds, strict=True)) for width, seconds in times.items()}


def main(
    layers: Annotated[int, typer.Option(min=4, help="A multiple of 4.")] = 8,
    context: Annotated[int, typer.Option(min=1)] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
    output: Annotated[Path, typer.Option()] = FOLDER / "results" / "recurrent.md",
) -> None:
    """Measure both dtypes and write the page."""
    torch.set_num_threads(1)
    lines = ["# A verify pass over recurrent layers", "", __doc__.split("\n\n")[2].replace("\n", " "), ""]
    lines += [*describe_run(), "", "| width | " + " | ".join(f"{dtype}: pass | taken back" for dtype in DTYPES) + " |"]
    lines.append("| ---: " * (1 + 2 * len(DTYPES)) + "|")
    seconds = {
        name: measure(build(dtype, num_hidden_layers=layers), context, repeats) for name, dtype in DTYPES.items()
    }
    for width in WIDTHS:
        cells = [part / by_width[1][0] for by_width in seconds.values() for part in by_width[width]]
        lines.append(f"| {width} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    plain = ", ".join(f"{1e3 * by_width[1][0]:.0f} ms in {name}" for name, by_width in seconds.items())
    print(write_page([*lines, "", f"In plain steps: {plain} with {layers} layers."], output))


if __name__ == "__main__":
    typer.run(main)
