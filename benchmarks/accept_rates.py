"""How often each draft of a block is accepted if those before it are, along texts that a target wrote greedily.

    python -m benchmarks.accept_rates answers.jsonl --model smollm2

Takes lines of `prompt` and `completion_ids`, as `dspark-hf data` writes them, and drafts behind every position of the
given texts: one pass over each of them tells all. Counted, not timed. What it prints first is a drafter's
`accept_rates`; then, for every file, how many tokens a block brings and how far the confidence is off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.loading import DTYPES, DtypeName, Packaged, PackagedName, load_packaged
from dspark_hf import DSparkAssistantModel
from dspark_hf.calibration.diagrams import draw_reliability
from dspark_hf.calibration.observations import Observations, join_observations
from dspark_hf.calibration.report import score
from dspark_hf.generation.drafting.chain import sample_block
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.prompts import encode_prompt, user_turn


@torch.no_grad()
def blocks_behind(
    target: Any, drafter: Any, prompt: Sequence[int], text: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Return the greedy blocks `(tokens, block_size)` behind every token of a text, and their confidence's logits.

    The logits are `(tokens, block_size)`, fp32, at temperature 1; None without a confidence head.
    """
    ids = torch.tensor([[*prompt, *text]])
    places = torch.arange(len(prompt), ids.shape[1])
    anchors = ids[0, places]
    with TargetAdapter(target, drafter.target_layer_ids) as adapter:
        adapter.model(ids)
        states = adapter.pop_context_hidden_states()
        # what the heads are told here is not used: the chain tells the Markov head its own drafts
        previous = anchors[None, :, None].expand(-1, -1, drafter.block_size)
        out = drafter(states, anchors[None], places[None], previous, adapter)
        drafts, _, previous = sample_block(
            drafter.draft_head(adapter)(out.hidden_states)[0],
            out.hidden_states[0],
            anchors,
            lambda slot, logits, drafted: (logits.argmax(-1), None),
            markov_head=drafter.markov_head,
            vocab_size=target.get_input_embeddings().num_embeddings,
            proposable_ids=drafter.draft_token_ids,
            markov_top_k=drafter.markov_top_k,
        )
        # once more, for a confidence that knows the drafts
        logits = drafter(states, anchors[None], places[None], previous[None], adapter).confidence_logits
    return drafts, None if logits is None else logits[0]


def num_right(block: Sequence[int], text: Sequence[int]) -> int:
    """Return how many drafts of a block are what the text goes on with."""
    pairs = enumerate(zip(block, text, strict=False))
    return next((place for place, (draft, token) in pairs if draft != token), min(len(block), len(text)))


def counts_behind(drafts: Tensor, text: Sequence[int], places: Sequence[int]) -> list[int]:
    """Return how many drafts of the blocks `(tokens, block_size)` behind these places of a text it goes on with."""
    return [num_right(drafts[place].tolist(), text[place + 1 :]) for place in places]


def rates_of(counts: Sequence[int], block_size: int) -> list[float]:
    """Return how often each draft is right if those before it are, given how many of each block are."""
    reached = [sum(count >= place for count in counts) for place in range(block_size + 1)]
    return [round(reached[place + 1] / max(reached[place], 1), 3) for place in range(block_size)]


def read_texts(path: Path, tokenizer: Any, few: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield prompt and text of every line that was written greedily and has more than a `few` tokens."""
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        if fields["sampling"] == "greedy" and len(fields["completion_ids"]) > few:
            asked = fields["prompt"]
            prompt = user_turn(asked if isinstance(asked, str) else asked[0]["content"])
            yield encode_prompt(prompt, tokenizer).tolist(), fields["completion_ids"]


def main(
    files: Annotated[list[Path], typer.Argument(help="JSON Lines of `prompt` and `completion_ids`.")],
    model: PackagedName = "smollm2",
    dtype: DtypeName = "bf16",
    drafter: Annotated[str, typer.Option(help="Another folder than that of the shipped one.")] = "",
    target: Annotated[str, typer.Option(help="Folder of a fine-tune of the packaged target, in its place.")] = "",
    num_texts: Annotated[int, typer.Option(min=1, help="Of each file at most.")] = 80,
    most_tokens: Annotated[int, typer.Option(min=16, help="Of a text.")] = 96,
    figure: Annotated[Path | None, typer.Option(help="PNG of how far the confidence is off, over all files.")] = None,
) -> None:
    """Print the rates, what blocks bring and how far their confidence is off."""
    packaged = load_packaged(model, dtype)
    if drafter:
        other = DSparkAssistantModel.from_pretrained(drafter, dtype=DTYPES[dtype])
        packaged = replace(packaged, drafter=other)
    if target:
        tuned = AutoModelForCausalLM.from_pretrained(target, dtype=DTYPES[dtype])
        packaged = replace(packaged, target=tuned, tokenizer=AutoTokenizer.from_pretrained(target))
    if figure is not None and packaged.drafter.confidence_head is None:
        raise typer.BadParameter("`--figure` needs a drafter with a confidence head, this one has none. Leave it out.")
    files_blocks = [_blocks_of(path, packaged, num_texts, most_tokens) for path in files]
    blocks = join_observations(files_blocks)
    print(rates_of(blocks.num_accepted.tolist(), packaged.drafter.block_size))
    for name, part in [*zip([path.name for path in files], files_blocks, strict=True), ("all", blocks)]:
        print(f"{name}: {_described(part)}")
    if figure is not None and _is_believed(blocks):
        draw_reliability(figure, blocks, title=f"{packaged.title}, greedy, {dtype}: {len(blocks):,} blocks")


def _blocks_of(path: Path, packaged: Packaged, num_texts: int, most_tokens: int) -> Observations:
    """Return the blocks behind the texts of a file."""
    size = packaged.drafter.block_size
    parts = [Observations(torch.empty(0, size, dtype=torch.float64), *(torch.empty(0, dtype=torch.long),) * 3)]
    for number, (prompt, text) in enumerate(islice(read_texts(path, packaged.tokenizer, size), num_texts)):
        drafts, logits = blocks_behind(packaged.target, packaged.drafter, prompt, text[:most_tokens])
        # behind the last tokens there is nothing to compare whole blocks with
        places = range(min(len(text), most_tokens) - size)
        counts = torch.tensor(counts_behind(drafts, text, places), dtype=torch.long)
        known = torch.full_like(drafts, math.nan, dtype=torch.float64) if logits is None else logits
        parts.append(
            Observations(
                known[: len(counts)].double(), counts, torch.full_like(counts, size), torch.full_like(counts, number)
            )
        )
    return join_observations(parts)


def _is_believed(blocks: Observations) -> bool:
    """Return whether there are blocks, and a confidence head that said something of them."""
    return len(blocks) > 0 and not bool(blocks.confidence_logits.isnan().any())


def _described(blocks: Observations) -> str:
    """Return how many tokens blocks bring, and how far their confidence is off."""
    told = (
        f"{len(blocks)} blocks, {1 + blocks.num_accepted.double().mean():.3f} tokens each, the bonus token's included"
    )
    if not _is_believed(blocks):
        return told
    scores = score(blocks, [1.0] * blocks.block_size)
    first = scores.survival[0]
    errors = " ".join(f"{slot.ece:.3f}" for slot in scores.survival)
    return (
        f"{told}; ECE of the survival {scores.mean_ece:.3f} ({errors}); of first drafts {first.mean_prediction:.3f} "
        f"are believed to be accepted, {first.mean_outcome:.3f} are"
    )


if __name__ == "__main__":
    typer.run(main)
