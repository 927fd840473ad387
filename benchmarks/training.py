"""What a training step's time goes to: blocks a second of one core, eager and compiled, and the most it could be.

    python -m benchmarks.training --chats drafters/text/smollm2.jsonl

By turns, and timed on the processor, since the machine may be shared; one thread. The target's states are at hand, as
they are from the second epoch on, or computed, as they are in the first. The most that could be is what the matrix
products alone would take at the rate of this core's largest ones: the rest of a step is the drafter's small operators.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from time import process_time
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf.demo.packaged import converted_target
from dspark_hf.training.arguments import DSparkTrainingArguments
from dspark_hf.training.conversations import Conversation, collate, read_conversations
from dspark_hf.training.recipe import build_drafter
from dspark_hf.training.states import TargetStates
from dspark_hf.training.trainer import DSparkTrainer

_COMPILED = {"compile_loss": True, "compile_drafter": True}
# options, and whether the target's states are at hand
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "eager": ({}, True),
    "compiled loss": ({"compile_loss": True}, True),
    "compiled loss and drafter": (_COMPILED, True),
    "compiled, states computed": (_COMPILED, False),
}


def main(
    chats: Annotated[Path, typer.Option(help="Conversations of SmolLM2-135M-Instruct.")],
    batches: Annotated[int, typer.Option(min=1, help="Conversations a round, one a pass.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after one that warms up.")] = 5,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = FOLDER / "results" / "training.md",
) -> None:
    """Measure, write the page and print it."""
    torch.set_num_threads(1)
    folder = converted_target("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    conversations = read_conversations(chats, tokenizer, max_length=768)[:batches]
    trainers = {
        name: _trainer(target, conversations, layers, options, keep) for name, (options, keep) in VARIANTS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds + 1):
        for name, trainer in trainers.items():
            seconds[name].append(_round(trainer))
    num_blocks = sum(_num_blocks(one, trainers["eager"].args.num_anchors) for one in conversations)
    # compiled ones make the same products, which the counter does not see
    products = {True: _products(trainers["eager"]) / num_blocks}
    products[False] = _products(_trainer(target, conversations, layers, {}, False)) / num_blocks
    print(
        write_page(
            _page({k: v[1:] for k, v in seconds.items()}, num_blocks, products, _largest_rate(), layers), output
        )
    )


def _page(
    seconds: dict[str, list[float]], num_blocks: int, products: dict[bool, float], rate: float, layers: int
) -> list[str]:
    """Return the page: of every variant the seconds of each round; products of a block, and this core's a second."""
    lines = [
        "# Training throughput",
        "",
        f"A drafter of {layers} layers for SmolLM2-135M-Instruct, three taps, 8,192 proposable tokens, blocks of 7, a "
        "conversation a pass, 128 blocks at most, bf16; forward and backward passes without the optimiser's step. "
        f"Products: what the matrix products of a block would take at {rate / 1e9:.0f} GFLOP/s, which this core does "
        "of large ones in bf16.",
        "",
        *describe_run(),
        "",
        "| | blocks/s | against eager | GFLOP a block | by products alone | reached |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, times in seconds.items():
        # rounds of one moment are compared: the machine may be busier in another
        ratios = [eager / one for eager, one in zip(seconds["eager"], times, strict=True)]
        needed, speed = products[VARIANTS[name][1]], num_blocks / median(times)
        lines.append(
            f"| {name} | {speed:.0f} | {median(ratios):.2f} | {needed / 1e9:.2f} | {rate / needed:.0f} "
            f"| {speed * needed / rate:.0%} |"
        )
    return lines


def _products(trainer: DSparkTrainer) -> float:
    """Return the floating-point operations of a round's matrix products."""
    with FlopCounterMode(display=False) as counted:
        _round(trainer)
    return float(counted.get_total_flops())


def _largest_rate(size: int = 2048, repeats: int = 5) -> float:
    """Return the operations a second of this core in a large bf16 product, its best of some."""
    factor = torch.randn(size, size).to(torch.bfloat16)
    times = []
    for _ in range(repeats):
        start = process_time()
        factor @ factor
        times.append(process_time() - start)
    return 2 * size**3 / min(times)


def _trainer(
    target: Any, conversations: list[Conversation], layers: int, options: dict[str, Any], keep: bool
) -> DSparkTrainer:
    drafter = build_drafter(target, conversations, layers=layers, warm_start=False)
    arguments = DSparkTrainingArguments(
        mkdtemp(), max_steps=1, num_anchors=128, bf16=True, save_strategy="no", report_to="none", **options
    )
    trainer = DSparkTrainer(drafter, target, arguments, conversations)
    if keep:
        _keep_states(trainer)
    return trainer


def _keep_states(trainer: DSparkTrainer) -> None:
    compute = trainer._states.get
    kept: dict[Any, TargetStates] = {}

    def get(sequences: list[Tensor]) -> TargetStates:
        key = tuple(tuple(one.tolist()) for one in sequences)
        if key not in kept:
            kept[key] = compute(sequences)
        return kept[key]

    trainer._states.get = get  # type: ignore[method-assign]


def _round(trainer: DSparkTrainer) -> float:
    """Return the processor's seconds for a forward and a backward pass over every conversation."""
    start = process_time()
    dataset: Any = trainer.train_dataset
    drafter: Any = trainer.model
    drafter.train()
    for index in range(len(dataset)):
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(drafter, collate([dataset[index]]))
        loss.backward()
    drafter.zero_grad()
    return process_time() - start


def _num_blocks(conversation: Conversation, num_anchors: int) -> int:
    mask = conversation.loss_mask
    return min(int((mask[:-1] & mask[1:]).sum()), num_anchors)


if __name__ == "__main__":
    typer.run(main)
