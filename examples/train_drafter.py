"""A drafter for your own model, from nothing: text, training, calibration, and what it brings.

    python examples/train_drafter.py TARGET --output drafter-for-mine

TARGET is a folder or a hub name. Interrupted? Run it again: it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dspark_hf import DSparkAssistantModel
from dspark_hf.calibration import calibrate, collect_observations
from dspark_hf.data import DataOptions, collect
from dspark_hf.loading import load_target, load_tokenizer
from dspark_hf.training import (
    DSparkTrainer,
    DSparkTrainingArguments,
    build_drafter,
    read_conversations,
    save_trained,
    split_held_out,
)


def main() -> None:
    """Write text with the target, train a drafter on it, calibrate it and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, help="prompts of your users, JSON Lines; default: the target's own")
    parser.add_argument("--num-conversations", type=int, default=4000)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--draft-vocab", type=int, default=8192)
    arguments = parser.parse_args()
    texts = arguments.output / "texts.jsonl"
    count, length = arguments.num_conversations, arguments.max_new_tokens

    # 1. the target writes what the drafter is to foresee
    prompts = arguments.prompts
    collect(DataOptions(arguments.target, texts, prompts, num_conversations=count, max_new_tokens=length))

    # 2. a small drafter that begins with the target's last layers
    target, tokenizer = load_target(arguments.target, dtype="bf16"), load_tokenizer(arguments.target)
    conversations = read_conversations(texts, tokenizer)
    training, held_out = split_held_out(conversations, min(40, len(conversations) // 4))
    drafter = build_drafter(target, training, draft_vocab=arguments.draft_vocab)
    options = DSparkTrainingArguments(
        str(arguments.output / "run"),
        max_steps=arguments.max_steps,
        per_device_train_batch_size=4,
        num_anchors=128,
        learning_rate=4e-3,
        bf16=True,
        state_cache_gb=8,
        eval_strategy="steps",
        report_to="none",
    )
    trainer = DSparkTrainer(drafter, target, options, training, held_out, processing_class=tokenizer)
    trainer.train()

    # 3. how far to trust its confidence, from the beginnings of texts it has not seen
    folder = arguments.output / "drafter"
    prompts = [one.input_ids[: int((~one.loss_mask).sum())] for one in held_out]
    drafter.eval().to(dtype=target.dtype)
    observations = collect_observations(target, drafter, prompts, max_new_tokens=length)
    report = calibrate(observations, objective="brier", min_reached=20)
    if report.is_improvement:
        drafter.config.sts_temperatures = list(report.temperatures)
    save_trained(trainer, folder)

    # 4. the same answer in fewer passes of the target
    loaded = DSparkAssistantModel.from_pretrained(folder, dtype=target.dtype).to(target.device)
    target.generate(prompts[0][None].to(target.device), assistant_model=loaded, max_new_tokens=length)
    print(f"tau {loaded.last_statistics.tau:.2f} tokens per round; the drafter is in {folder}")


if __name__ == "__main__":
    main()
