"""Train the shipped drafter for SmolLM2-135M-Instruct from chats the model wrote itself.

    python drafters/train_smollm2.py --target FOLDER --chats chats.jsonl --output runs/smollm2

The target's folder is what `python -m dspark_hf demo` converts and caches. An interrupted run continues where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark_hf import DSparkAssistantModel
from dspark_hf.training.data import most_frequent_tokens, read_conversations, split_held_out
from dspark_hf.training.trainer import DrafterTrainer, TrainingOptions

DRAFT_VOCAB_SIZE = 8192
NUM_HELD_OUT = 40


def main() -> None:
    """Train, then save the drafter in bf16 beside its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, help="folder of the target")
    parser.add_argument("--chats", required=True, help="JSON Lines with `user` and `assistant`")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--max-steps", type=int, default=1600)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32)
    conversations = read_conversations(arguments.chats, tokenizer)
    conversations, held_out = split_held_out(conversations, NUM_HELD_OUT)
    torch.manual_seed(0)
    drafter = DSparkAssistantModel.from_target(
        target,
        num_hidden_layers=2,
        target_layer_ids=[9, 19, 28],
        markov_rank=64,
        draft_token_ids=most_frequent_tokens(conversations, DRAFT_VOCAB_SIZE, target.config.vocab_size),
        warm_start=True,
    )
    options = TrainingOptions(
        max_steps=arguments.max_steps,
        sequences_per_step=4,
        anchors_per_sequence=128,
        learning_rate=4e-3,
        optimizer="muon",
        warmup_steps=20,
        eval_steps=100,
        save_steps=50,
        max_cache_gb=6.0,
    )
    DrafterTrainer(drafter, target, conversations, held_out, arguments.output, options).train()
    folder = arguments.output / "drafter"
    drafter.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
