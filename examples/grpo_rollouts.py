"""Rollouts of TRL's GRPO with a drafter, which is adapted while the policy moves: tau with and without adapting.

    python examples/grpo_rollouts.py TARGET DRAFTER prompts.jsonl --steps 60 --adapt-every 5

TARGET is trained twice from the same weights, for answers with many different words, a reward that needs no model.
Prompts are JSON Lines with `prompt`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from dspark_hf.loading import load_drafter
from dspark_hf.training import RolloutDrafter


def reward_variety(completions: list[Any], **_: Any) -> list[float]:
    """Return the share of different words in each answer."""
    words = [(one if isinstance(one, str) else one[0]["content"]).split() for one in completions]
    return [len(set(one)) / max(len(one), 1) for one in words]


def main() -> None:
    """Train the policy with and without an adapting drafter, and print tau over the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/grpo"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--adapt-every", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="the policy's")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    lines = arguments.prompts.read_text(encoding="utf-8").split("\n")
    prompts = Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines if line.strip()])
    tokenizer = AutoTokenizer.from_pretrained(arguments.target, padding_side="left")
    taus = {}
    for adapt_every in (None, arguments.adapt_every):
        # fp32: what the policy learns in a step is lost in bf16
        policy: Any = AutoModelForCausalLM.from_pretrained(arguments.target, dtype="float32")
        drafts = RolloutDrafter(
            load_drafter(arguments.drafter, dtype="float32").to(policy.device), adapt_every=adapt_every
        )
        config = GRPOConfig(
            str(arguments.output / ("plain" if adapt_every is None else "adapted")),
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=arguments.max_new_tokens,
            learning_rate=arguments.learning_rate,
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
            save_strategy="no",
        )
        trainer = GRPOTrainer(policy, reward_variety, config, prompts, processing_class=tokenizer, callbacks=[drafts])
        trainer.train()
        taus[adapt_every] = [record.tau for record in drafts.records if record.num_rounds]
    print("steps of the policy: tau without, with adapting")
    fifth = max(arguments.steps // 5, 1)
    for first in range(0, arguments.steps, fifth):
        without, with_it = (mean(one[first : first + fifth]) for one in taus.values())
        print(f"{first + 1} to {min(first + fifth, arguments.steps)}: {without:.2f}, {with_it:.2f}")


if __name__ == "__main__":
    main()
