"""Greedy accepted length of a drafter on prompt files, and whether its texts equal plain `generate`.

python -m benchmarks.acceptance gsm8k_eval.jsonl mbpp_eval.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.overhead import FOLDER, read_prompts
from benchmarks.provenance import describe_run
from dspark_hf import DSparkAssistantModel
from dspark_hf.demo.comparison import Answer, answer, encode_prompt
from dspark_hf.demo.packaged import PACKAGED_MODELS, converted_target, shipped_drafter


def main(
    files: Annotated[list[Path], typer.Argument(help='JSON Lines, each {"turns": [...]}.')],
    num_prompts: Annotated[int, typer.Option(min=1)] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    target: Annotated[str | None, typer.Option(help="Default: the packaged SmolLM2.")] = None,
    drafter: Annotated[str | None, typer.Option(help="Default: the shipped drafter.")] = None,
    output: Annotated[Path, typer.Option(help="Where the table goes.")] = FOLDER / "results" / "acceptance.md",
) -> None:
    """Measure in fp32, print the table and write it to a file."""
    model = PACKAGED_MODELS["smollm2"]
    target_folder = target or converted_target("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    loaded_target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    loaded_drafter = DSparkAssistantModel.from_pretrained(drafter or shipped_drafter(model), dtype=torch.float32)
    lines = [
        "# Accepted length",
        "",
        f"{Path(target).name if target else model.title}, fp32, greedy, blocks of {loaded_drafter.block_size}, the "
        f"first {num_prompts} prompts of each file, {max_new_tokens} new tokens at most. tau counts the bonus token.",
        "",
        *describe_run(),
        "",
        "| prompts | tau | accepted by position, given the prefix | identical to plain |",
        "| --- | ---: | --- | ---: |",
    ]
    for path in files:
        pairs = []
        for prompt in track(read_prompts(path, num_prompts), path.stem, transient=True):
            inputs = encode_prompt(tokenizer, prompt)
            pairs.append(
                tuple(
                    answer(loaded_target, inputs, max_new_tokens=max_new_tokens, **options)
                    for options in ({}, {"assistant_model": loaded_drafter})
                )
            )
        lines.append(_row(path.stem, pairs))
    text = "\n".join(lines) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(text)


def _row(name: str, pairs: list[tuple[Answer, ...]]) -> str:
    statistics = [assisted.statistics for _, assisted in pairs if assisted.statistics is not None]
    tau = sum(one.num_committed for one in statistics) / sum(one.num_rounds for one in statistics)
    width = max(len(one.verified_by_position) for one in statistics)
    rates = []
    for position in range(width):
        seen = [one for one in statistics if position < len(one.verified_by_position)]
        verified = sum(one.verified_by_position[position] for one in seen)
        accepted = sum(one.accepted_by_position[position] for one in seen)
        rates.append(f"{accepted / max(verified, 1):.2f}")
    same = sum(plain.token_ids == assisted.token_ids for plain, assisted in pairs)
    return f"| {name} | {tau:.2f} | {' '.join(rates)} | {same} of {len(pairs)} |"


if __name__ == "__main__":
    typer.run(main)
