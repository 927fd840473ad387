"""Which way to train makes the best drafter in the same time: one choice changed at a time, on text that is new.

    python -m benchmarks.recipes --chats answers.jsonl --held-out-answers others.jsonl --work runs/recipes --minutes 5

Time is the processor's, of one thread, so that other work on the machine does not decide. A few steps tell what a step
of a recipe takes, the target's pass included (where text is read again, with and without it), and the time becomes a
number of steps, over which the learning rate decays. Each recipe is kept in `--work` as soon as it is measured; what
was interrupted begins again there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from benchmarks.accept_rates import blocks_behind, counts_behind, read_texts
from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf.demo.packaged import converted_target
from dspark_hf.files import write_whole
from dspark_hf.training.arguments import DSparkTrainingArguments
from dspark_hf.training.conversations import Conversation, read_conversations, split_held_out
from dspark_hf.training.recipe import build_drafter
from dspark_hf.training.trainer import DSparkTrainer

# compiling is over after the first of them
_TIMING_STEPS, _TIMED = 6, 4
# conversations
_A_STEP = 4
_MOST_TOKENS = 96


@dataclass(frozen=True)
class Recipe:
    """How a drafter is made; the defaults are what the others are compared with.

    Args:
        name: what the table calls it.
        drafter: options of `build_drafter`.
        training: options of `DSparkTrainingArguments`.
        num_conversations: how many conversations it sees, over and over, their states kept; None for all, once.
    """

    name: str
    drafter: Mapping[str, Any]
    training: Mapping[str, Any]
    num_conversations: int | None = None


def _recipe(name: str, num_conversations: int | None = None, **changed: Any) -> Recipe:
    drafter = {"layers": 2, "target_layer_ids": [9, 19, 28], "markov_rank": 64, "draft_vocab": 8192}
    drafter |= {"warm_start": True}
    training = {"drafter_optimizer": "muon", "learning_rate": 4e-3, "num_anchors": 128, "loss_decay_gamma": 4.0}
    training |= {"loss_ce": 0.1, "loss_tv": 0.9}
    assert changed.keys() <= drafter.keys() | training.keys(), changed
    return Recipe(
        name,
        {key: changed.get(key, value) for key, value in drafter.items()},
        {key: changed.get(key, value) for key, value in training.items()},
        num_conversations,
    )


RECIPES = (
    _recipe("base"),
    _recipe("cross-entropy 0.5, total variation 0.5", loss_ce=0.5, loss_tv=0.5),
    _recipe("cross-entropy 1, total variation 0", loss_ce=1.0, loss_tv=0.0),
    _recipe("3 layers", layers=3),
    _recipe("4 layers", layers=4),
    _recipe("cold start", warm_start=False),
    _recipe("6 taps", target_layer_ids=[4, 9, 14, 19, 24, 28]),
    _recipe("draft vocabulary 16k", draft_vocab=16384),
    _recipe("Markov rank 256", markov_rank=256),
    _recipe("slots decay by 8", loss_decay_gamma=8.0),
    _recipe("Muon at 8e-3", learning_rate=8e-3),
    _recipe("AdamW at 1e-3", drafter_optimizer="adamw", learning_rate=1e-3),
    _recipe("64 blocks a conversation", num_anchors=64),
    _recipe("200 conversations over and over", num_conversations=200),
    _recipe("1 tap", target_layer_ids=[28]),
    _recipe("draft vocabulary 4k", draft_vocab=4096),
    _recipe("Markov rank 16", markov_rank=16),
    _recipe("slots decay by 2", loss_decay_gamma=2.0),
    _recipe("Muon at 2e-3", learning_rate=2e-3),
)


@dataclass
class Result:
    """What became of a recipe.

    Args:
        steps: optimiser steps within the time.
        held_out_tau: expected, teacher-forced.
        tokens: tokens a greedy block brings behind the answers, the bonus token's included.
        weights: parameters.
    """

    steps: int
    held_out_tau: float
    tokens: float
    weights: int


class _Clock(TrainerCallback):
    """The processor's time after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(process_time())


@dataclass
class Bench:
    """What all recipes share."""

    target: Any
    tokenizer: Any
    training: list[Conversation]
    held_out: list[Conversation]
    answers: list[tuple[list[int], list[int]]]
    work: Path

    def measure(self, recipe: Recipe, minutes: float) -> Result:
        """Train for the time and measure."""
        # states that an earlier run has left would cost nothing
        with TemporaryDirectory(dir=self.work) as states:
            steps = self._steps_within(recipe, 60 * minutes, states)
            trainer = self._trainer(recipe, steps, states)
            trainer.train()
            tau = trainer.evaluate()["eval_expected_tau"]
        drafter = trainer.accelerator.unwrap_model(trainer.model).eval()
        weights = sum(one.numel() for one in drafter.parameters())
        return Result(steps, tau, tokens_a_block(self.target, drafter.to(torch.bfloat16), self.answers), weights)

    def _steps_within(self, recipe: Recipe, seconds: float, states: str) -> int:
        """Return how many steps the time allows, two at least."""
        first = self._seconds_a_step(recipe, states)
        if recipe.num_conversations is None:
            return max(round(seconds / first), 2)
        # the same ones again, whose states are kept now
        later = self._seconds_a_step(recipe, states)
        num_first = recipe.num_conversations / _A_STEP
        return max(round(min(num_first, seconds / first) + max(seconds - num_first * first, 0) / later), 2)

    def _seconds_a_step(self, recipe: Recipe, states: str) -> float:
        clock = _Clock()
        self._trainer(recipe, _TIMING_STEPS, states, clock).train()
        return (clock.times[-1] - clock.times[-1 - _TIMED]) / _TIMED

    def _trainer(self, recipe: Recipe, steps: int, states: str, *callbacks: TrainerCallback) -> DSparkTrainer:
        # what two recipes have in common begins alike
        set_seed(0)
        drafter = build_drafter(self.target, self.training, **recipe.drafter)
        arguments = DSparkTrainingArguments(
            str(self.work / "run"),
            max_steps=steps,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=_A_STEP,
            bf16=True,
            compile_loss=True,
            compile_drafter=True,
            state_cache_gb=8 if recipe.num_conversations else 0,
            state_cache_dir=states,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            **recipe.training,
        )
        # of all kinds, whatever the order of the files
        text = spread(self.training, recipe.num_conversations or len(self.training))
        return DSparkTrainer(drafter, self.target, arguments, text, self.held_out, callbacks=list(callbacks))


def spread(items: Sequence[Any], num_items: int) -> list[Any]:
    """Return so many items, evenly spread over all."""
    return [items[place * len(items) // num_items] for place in range(num_items)]


@torch.no_grad()
def tokens_a_block(target: Any, drafter: Any, answers: Sequence[tuple[list[int], list[int]]]) -> float:
    """Return how many tokens a greedy block brings behind every token of these answers."""
    counts: list[int] = []
    for prompt, answer in answers:
        text = answer[:_MOST_TOKENS]
        drafts, _ = blocks_behind(target, drafter, prompt, text)
        counts += counts_behind(drafts, answer, range(min(len(answer) - drafter.block_size, len(text))))
    return 1 + sum(counts) / len(counts)


def make_table(results: Mapping[str, Result]) -> list[str]:
    """Return the table, with what each recipe brings beside the first."""
    base = next(iter(results.values()))
    lines = [
        "| recipe | weights | steps | held-out tau | tokens a greedy block | beside the base |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in results.items():
        beside = f"{one.tokens / base.tokens - 1:+.1%}" if one is not base else ""
        lines.append(
            f"| {name} | {one.weights / 1e6:.1f} M | {one.steps} | {one.held_out_tau:.2f} | {one.tokens:.3f} "
            f"| {beside} |"
        )
    return lines


def main(
    chats: Annotated[list[Path], typer.Option(help="Conversations to train on, SmolLM2's own.")],
    held_out_answers: Annotated[list[Path], typer.Option(help="Greedy answers to other prompts.")],
    work: Annotated[Path, typer.Option(help="Where results are kept.")],
    minutes: Annotated[float, typer.Option(help="The processor's, of each recipe.")] = 5.0,
    num_answers: Annotated[int, typer.Option(min=1, help="Of each file.")] = 24,
    only: Annotated[list[str] | None, typer.Option(help="Names of recipes; default: all.")] = None,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = FOLDER / "results" / "recipes.md",
) -> None:
    """Measure what is not measured yet, and write the page after every recipe."""
    torch.set_num_threads(1)
    folder = converted_target("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    texts = [one for path in chats for one in read_conversations(path, tokenizer, max_length=640)]
    training, held_out = split_held_out(texts, 24)
    answers = [
        one for path in held_out_answers for one in islice(read_texts(path, tokenizer, _MOST_TOKENS // 4), num_answers)
    ]
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(target, tokenizer, training, held_out, answers, work)
    results: dict[str, Result] = {}
    for recipe in RECIPES:
        if only and recipe.name not in only:
            continue
        kept = work / f"{recipe.name}.json"
        if not kept.is_file():
            print(f"{recipe.name} ...", flush=True)
            result = bench.measure(recipe, minutes)
            write_whole(kept, json.dumps(asdict(result)).encode())
        results[recipe.name] = Result(**json.loads(kept.read_text(encoding="utf-8")))
        write_page([*_head(minutes, len(training), len(answers)), *make_table(results)], output)


def _head(minutes: float, num_conversations: int, num_answers: int) -> list[str]:
    return [
        "# Recipes at equal time",
        "",
        f"Drafters for SmolLM2-135M-Instruct, {minutes:g} minutes of one thread's processor time each, on "
        f"{num_conversations:,} of its own conversations in the same order, 4 a step. The base: two layers that start "
        "as the target's last, three taps, 8,192 tokens, a Markov head of rank 64, 128 blocks a conversation, 0.1 "
        "cross-entropy and 0.9 total variation, slots that decay by 4, Muon at 4e-3. Compiling is not counted, the "
        "target's pass is. Tokens a block: greedy, behind every token of "
        f"{num_answers} greedy answers to other prompts, the bonus token's included.",
        "",
        *describe_run(),
        "",
    ]


if __name__ == "__main__":
    typer.run(main)
