"""Train the shipped drafter for SmolLM2-135M-Instruct further, on chats the model wrote itself.

    python drafters/train_smollm2.py --start FOLDER --chats chats.jsonl --chats more.jsonl --output runs/smollm2

`--start` is a drafter to go on from. Its Markov head is cut to the draft vocabulary, which makes it a quarter smaller.
An interrupted run continues where it was. The target comes from the packaged weights that the demo uses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark_hf import DSparkAssistantModel, DSparkConfig
from dspark_hf.demo.packaged import converted_target
from dspark_hf.training.arguments import DSparkTrainingArguments
from dspark_hf.training.conversations import read_conversations, split_held_out
from dspark_hf.training.trainer import DSparkTrainer

NUM_HELD_OUT = 40


def main() -> None:
    """Train, then save the drafter in bf16 beside its tokenizer and its log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", required=True, help="folder of the drafter to go on from")
    parser.add_argument("--chats", required=True, action="append", help="JSON Lines with `user` and `assistant`")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--max-steps", type=int, default=2000)
    arguments = parser.parse_args()

    folder = converted_target("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    training, held_out = [], []
    for chats in arguments.chats:
        conversations = read_conversations(chats, tokenizer, max_length=768)
        kept, apart = split_held_out(conversations, NUM_HELD_OUT // len(arguments.chats))
        training += kept
        held_out += apart
    drafter = cut_markov_head(DSparkAssistantModel.from_pretrained(arguments.start, dtype=torch.float32))
    options = DSparkTrainingArguments(
        str(arguments.output),
        max_steps=arguments.max_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        num_anchors=128,
        learning_rate=2e-3,
        warmup_steps=40,
        bf16=True,
        state_cache_gb=8,
        eval_strategy="steps",
        eval_steps=200,
        save_steps=100,
        save_total_limit=2,
        logging_steps=20,
        report_to="none",
    )
    trainer = DSparkTrainer(drafter, target, options, training, held_out, processing_class=tokenizer)
    if not list(arguments.output.glob("checkpoint-*")):
        trainer.evaluate()
    trainer.train()
    result = arguments.output / "drafter"
    drafter.eval().to(torch.bfloat16).save_pretrained(result)
    tokenizer.save_pretrained(result)
    log = "".join(json.dumps(record) + "\n" for record in trainer.state.log_history if "eval_loss" in record)
    (result / "training_log.jsonl").write_text(log, encoding="utf-8")


def cut_markov_head(drafter: DSparkAssistantModel) -> DSparkAssistantModel:
    """Return the same drafter whose Markov head tells only proposable previous tokens apart."""
    if drafter.config.markov_over_draft_vocab:
        return drafter
    cut = DSparkAssistantModel(DSparkConfig(**{**drafter.config.to_dict(), "markov_over_draft_vocab": True}))
    token_ids = drafter.draft_token_ids
    assert token_ids is not None  # the first drafter has a reduced vocabulary
    cut.set_draft_token_ids(token_ids)
    weights = drafter.state_dict()
    rows = weights.pop("markov_head.markov_w1.weight")
    # the tokens that cannot be proposed share the mean of their rows
    known, others = rows[drafter.t2d], rows[~drafter.t2d].mean(0, keepdim=True)
    weights["markov_head.markov_w1.weight"] = torch.cat([known, others])
    cut.load_state_dict({**weights, "markov_head.known_ids": token_ids})
    return cut


if __name__ == "__main__":
    main()
