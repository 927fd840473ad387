"""Where a training step goes, and what compiling gains: blocks a second of one core, eager and compiled by turns.

python -m benchmarks.training --chats drafters/text/smollm2.jsonl

The target's states are at hand, as they are from the second epoch on. Time on the processor, since the machine may be
shared; one thread.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.provenance import describe_run
from dspark_hf.demo.packaged import converted_target
from dspark_hf.training.arguments import DSparkTrainingArguments
from dspark_hf.training.conversations import Conversation, collate, read_conversations
from dspark_hf.training.recipe import build_drafter
from dspark_hf.training.states import TargetStates
from dspark_hf.training.trainer import DSparkTrainer

VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled loss": {"compile_loss": True},
    "compiled loss and drafter": {"compile_loss": True, "compile_drafter": True},
}


def main(
    chats: Annotated[Path, typer.Option(help="Conversations of SmolLM2-135M-Instruct.")],
    batches: Annotated[int, typer.Option(min=1, help="Conversations a round, one a pass.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after one that warms up.")] = 5,
    layers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    folder = converted_target("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    conversations = read_conversations(chats, tokenizer, max_length=768)[:batches]
    trainers = {name: _trainer(target, conversations, layers, options) for name, options in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds + 1):
        for name, trainer in trainers.items():
            seconds[name].append(_round(trainer))
    num_blocks = sum(_num_blocks(one, trainers["eager"].args.num_anchors) for one in conversations)
    print(
        "\n".join(
            [
                "# Training throughput",
                "",
                *describe_run(),
                "",
                "| | blocks/s | against eager |",
                "| --- | ---: | ---: |",
            ]
        )
    )
    for name, times in seconds.items():
        # rounds of one moment are compared: the machine may be busier in another
        ratios = [eager / one for eager, one in zip(seconds["eager"][1:], times[1:], strict=True)]
        print(f"| {name} | {num_blocks / median(times[1:]):.0f} | {median(ratios):.2f} |")


def _trainer(target: Any, conversations: list[Conversation], layers: int, options: dict[str, Any]) -> DSparkTrainer:
    drafter = build_drafter(target, conversations, layers=layers, warm_start=False)
    arguments = DSparkTrainingArguments(
        mkdtemp(), max_steps=1, num_anchors=128, bf16=True, save_strategy="no", report_to="none", **options
    )
    trainer = DSparkTrainer(drafter, target, arguments, conversations)
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
