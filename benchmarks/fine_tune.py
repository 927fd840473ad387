"""Fine-tune a small target on somebody's answers: what `docs/adapting.md` shows how to draft for.

python -m benchmarks.fine_tune --answers gsm8k_train.jsonl --output runs/tuned --max-steps 400

Every weight learns, as in a usual fine-tune, so that the text becomes another one: with the worked solutions of GSM8K
(`question` and `answer` in each line, as their authors publish them) SmolLM2 gives up its headings and sentences for
short lines of arithmetic. `dspark-hf data`, `train` and `eval` take the folder as any target. The same command goes on
where it was interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from dspark_hf.demo.packaged import converted_target
from dspark_hf.training.conversations import encode

_MAX_LENGTH = 512
_SAVE_EVERY = 20
_IGNORED = -100


def main(
    answers: Annotated[Path, typer.Option(help="JSON Lines with `question` and `answer`.")],
    output: Annotated[Path, typer.Option(help="Folder of the fine-tuned target.")],
    num_answers: Annotated[int, typer.Option(min=1, help="The first so many; the others stay unseen.")] = 3000,
    max_steps: Annotated[int, typer.Option(min=1, help="Steps of 8 answers.")] = 400,
    learning_rate: Annotated[float, typer.Option(min=0)] = 5e-5,
) -> None:
    """Fine-tune SmolLM2-135M-Instruct and save it with its tokenizer."""
    folder = converted_target("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoints = output / "checkpoints"
    arguments = TrainingArguments(
        str(checkpoints),
        max_steps=max_steps,
        # in two halves: a batch of eight needs a dozen gigabytes
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=learning_rate,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_steps=_SAVE_EVERY,
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
        seed=0,
    )
    trainer = Trainer(
        target,
        arguments,
        train_dataset=read_answers(answers, tokenizer, num_answers),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=_IGNORED),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    target.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def read_answers(path: Path, tokenizer: Any, count: int) -> list[dict[str, list[int]]]:
    """Return `input_ids` and `labels` of the first `count` lines; what the question holds is not learnt."""
    examples = []
    for line in path.read_text("utf-8").splitlines()[:count]:
        record = json.loads(line)
        conversation = encode(record["question"], record["answer"], tokenizer, max_length=_MAX_LENGTH)
        labels = conversation.input_ids.masked_fill(~conversation.loss_mask, _IGNORED)
        examples.append({"input_ids": conversation.input_ids.tolist(), "labels": labels.tolist()})
    return examples


if __name__ == "__main__":
    typer.run(main)
