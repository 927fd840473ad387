"""What a drafter gains over compiled passes, on a GPU: a random target of a real shape, a static cache, many rows.

    python -m benchmarks.gpu

Nothing is downloaded. Random weights cost what trained ones do; the drafter's block runs, and its drafts are made
right at the stated rate, so that tokens per round are chosen, not measured. The embedding is scaled up, so that the
next token follows from the last one by a wide margin: in bf16 the text is then the same at any width of a pass.

Transformers' own assisted generation serves one row. Its draft model has the drafter's number of layers, and the same
embedding: all of its drafts are right, which is the most that it can gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel

from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from benchmarks.simulation import SimulatedDrafter, random_target
from dspark_hf import DSparkAssistantModel

# of these, the first row's text is read before any time is taken
PROMPT_LENGTH = 64
# larger than what all layers add to it
_EMBEDDING_SCALE = 500.0
EAGER, STATIC, OURS_EAGER, OURS_STATIC, OTHER = (
    "plain, eager",
    "plain, static and compiled",
    "drafter, eager",
    "drafter, static and compiled",
    "Transformers' assisted, static",
)


@dataclass
class Result:
    """Tokens per second over all rows, tokens per round (NaN without), and the shares of a round in percent.

    `obstacle` says why there is none.
    """

    way: str
    num_rows: int
    speed: float = float("nan")
    tau: float = float("nan")
    draft: float = float("nan")
    verify: float = float("nan")
    other: float = float("nan")
    obstacle: str = ""


def stable_target(shape: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Return a random target whose next token depends on the last one by a wide margin."""
    target = random_target(shape, dtype, device)
    embedding: Any = target.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.mul_(_EMBEDDING_SCALE)
    return target


def generated(target: Any, prompts: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """Return the greedy texts `(B, length)` behind `prompts` `(B, P)`."""
    texts: Tensor = target.generate(prompts, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, **options)
    return texts


def options_of(way: str, *, compiles_anywhere: bool) -> dict[str, Any]:
    """Return what `generate` is told beside the drafter."""
    if way in (EAGER, OURS_EAGER):
        return {}
    options: dict[str, Any] = {"cache_implementation": "static"}
    if compiles_anywhere:
        # a processor is not compiled for by itself
        options["compile_config"] = CompileConfig(backend="eager", mode="default")
        options["compile_config"]._compile_all_devices = True
    return options


def assistant_like(target: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Return a draft model for Transformers' own assisted generation, with the target's embedding and head."""
    config = type(target.config).from_dict({**target.config.to_dict(), "num_hidden_layers": num_layers})
    config.layer_types = None if getattr(config, "layer_types", None) is None else config.layer_types[:num_layers]
    with torch.device(target.device):
        assistant = AutoModelForCausalLM.from_config(config, dtype=target.dtype)
    assistant.set_input_embeddings(target.get_input_embeddings())
    assistant.set_output_embeddings(target.get_output_embeddings())
    return assistant.eval()


def measure(
    target: PreTrainedModel, way: str, prompts: Tensor, new_tokens: int, runs: int, options: dict[str, Any]
) -> Result:
    """Return the median speed of `runs` calls, after one in which whatever has to be compiled is."""
    result, seconds = Result(way, len(prompts)), []
    try:
        for run in range(runs + 1):
            torch.manual_seed(run)
            _wait(target)
            start = perf_counter()
            text = generated(target, prompts, new_tokens, **options)
            _wait(target)
            seconds += [perf_counter() - start] if run else []
    except (ValueError, RuntimeError, NotImplementedError) as error:
        result.obstacle = f"{type(error).__name__}: {error}".split("\n")[0][:160]
        return result
    result.speed = (text.shape[1] - prompts.shape[1]) * len(prompts) / median(seconds)
    statistics = getattr(options.get("assistant_model"), "last_statistics", None)
    if statistics is not None:
        parts = statistics.draft_seconds, statistics.verify_seconds, statistics.other_seconds
        result.draft, result.verify, result.other = (100 * part / sum(parts) for part in parts)
        result.tau = statistics.tau
    return result


def _wait(target: PreTrainedModel) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)


def table(results: list[Result]) -> list[str]:
    """Return the lines of the page's table; speeds beside plain compiled decoding of as many rows."""
    base = {one.num_rows: one.speed for one in results if one.way == STATIC}
    lines = [
        "| rows | way | tokens/s | over compiled plain | tokens per round | draft / verify / rest, % |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for one in results:
        if one.obstacle:
            lines.append(f"| {one.num_rows} | {one.way} | - | - | - | {one.obstacle} |")
            continue
        gain = one.speed / base.get(one.num_rows, float("nan"))
        shares = "-" if one.tau != one.tau else f"{one.draft:.0f} / {one.verify:.0f} / {one.other:.1f}"
        tau = "-" if one.tau != one.tau else f"{one.tau:.2f}"
        lines.append(f"| {one.num_rows} | {one.way} | {one.speed:.0f} | {gain:.2f} | {tau} | {shares} |")
    return lines


def main(
    shape: Annotated[str, typer.Option(help="Shape of the target.")] = "qwen3-4b",
    device: Annotated[str, typer.Option(help="Where it runs.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="Of target and drafter.")] = "bfloat16",
    rate: Annotated[float, typer.Option(min=0.01, max=0.99, help="Chance of a draft, given those before it.")] = 0.73,
    rows: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4,16,64",
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    runs: Annotated[int, typer.Option(min=1, help="Runs whose median counts.")] = 3,
    seconds: Annotated[float, typer.Option(help="No further case is begun after that time.")] = 400.0,
    output: Annotated[Path, typer.Option(help="The page.")] = FOLDER / "results" / "gpu.md",
) -> None:
    """Print and write a table of speeds."""
    began = perf_counter()
    target = stable_target(shape, getattr(torch, dtype), device)
    trained = DSparkAssistantModel.from_target(target)
    drafter = SimulatedDrafter(trained, [rate] * trained.block_size)
    drafter.scheduler, drafter.drafts = "fixed", "model"
    assistant = assistant_like(target, len(trained.layers))
    on_cpu = target.device.type == "cpu"
    results: list[Result] = []
    for num_rows in map(int, rows.split(",")):
        prompts = torch.randint(2, target.config.vocab_size, (num_rows, PROMPT_LENGTH), device=target.device)
        drafter.script = generated(target, prompts, new_tokens)
        drafter.num_padded = [0] * num_rows
        for way in (EAGER, STATIC, OURS_EAGER, OURS_STATIC, OTHER):
            if way == OTHER and num_rows > 1:
                continue
            if perf_counter() - began > seconds:
                results.append(Result(way, num_rows, obstacle="not begun: the time was over"))
                continue
            options = options_of(way, compiles_anywhere=on_cpu)
            if way in (OURS_EAGER, OURS_STATIC):
                options["assistant_model"] = drafter
            elif way == OTHER:
                options["assistant_model"] = assistant
            results.append(measure(target, way, prompts, new_tokens, runs, options))
            typer.echo(table(results)[-1])
    lines = [
        f"# {shape} in {dtype} on {device}, compiled and not",
        "",
        f"Prompts of {PROMPT_LENGTH} tokens, {new_tokens} new ones, greedy, median of {runs} runs, prompts included. "
        f"Drafts are right with a chance of {rate} each, given those before them: simulated.",
        "",
        *table(results),
        "",
        *describe_run(),
    ]
    typer.echo(write_page(lines, output))


if __name__ == "__main__":
    typer.run(main)
