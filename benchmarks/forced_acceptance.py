"""Acceptance of drafts along texts of the target's own: by rule, by tokens that the Markov head corrects, by bits.

    python -m benchmarks.forced_acceptance

Every slot is judged behind the text's own tokens, so that all ways are compared at the same places: the chance that a
draft is accepted if those before it are. Counted, not timed.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import BitsAndBytesConfig

from benchmarks.loading import load_packaged
from dspark_hf import DSparkAssistantModel
from dspark_hf.demo.packaged import PACKAGED_MODELS, shipped_drafter
from dspark_hf.generation.noise import KeyedNoise
from dspark_hf.generation.targets.adapter import TargetAdapter

TEXTS = shipped_drafter(PACKAGED_MODELS["smollm2"]).parent / "text" / "smollm2.jsonl"
TOPS = (0, 16, 64, 128, 256, 512)
RULES = ("greedy", "usual rule", "invariant")


def load_ways() -> dict[str, DSparkAssistantModel]:
    """Return the shipped drafter in bf16, eight and four bits."""
    folder, dtype = shipped_drafter(PACKAGED_MODELS["smollm2"]), torch.bfloat16
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
    bits: dict[str, dict[str, Any]] = {
        "8 bit": {"load_in_8bit": True},
        "4 bit, nf4": {**four, "bnb_4bit_quant_type": "nf4"},
        "4 bit, fp4": four,
    }
    few = {
        name: DSparkAssistantModel.from_pretrained(
            folder, dtype=dtype, quantization_config=BitsAndBytesConfig(**options)
        )
        for name, options in bits.items()
    }
    return {"bf16": DSparkAssistantModel.from_pretrained(folder, dtype=dtype), **few}


def accepted(
    logits: Tensor, base: Tensor, token_ids: Tensor, target_logits: Tensor, noise: Tensor, top: int
) -> Tensor:
    """Return by each rule the chance `(slots, 3)` of a draft, or whether it is accepted."""
    if top:
        best = base.topk(top, -1).indices
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, best, logits.gather(-1, best))
    greedy = token_ids[logits.argmax(-1)] == target_logits.argmax(-1)
    overlap = torch.minimum(target_logits.softmax(-1)[:, token_ids], logits.softmax(-1)).sum(-1)
    same = token_ids[(logits + noise[:, token_ids]).argmax(-1)] == (target_logits + noise).argmax(-1)
    return torch.stack([greedy.float(), overlap, same.float()], dim=1)


@torch.no_grad()
def main(num_texts: Annotated[int, typer.Option(min=1)] = 8, most_tokens: int = 260, every: int = 4) -> None:
    """Print the chances, averaged over slots, and the tokens per round that they come to, token by token."""
    packaged, ways = load_packaged("smollm2", "bf16"), load_ways()
    found: dict[str, list[Tensor]] = {}
    for number, line in enumerate(TEXTS.read_text(encoding="utf-8").splitlines()[-num_texts:]):
        turns = json.loads(line)
        chat = [{"role": role, "content": turns[role]} for role in ("user", "assistant")]
        encoded: Any = packaged.tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        ids = encoded["input_ids"][:, :most_tokens]
        with TargetAdapter(packaged.target, packaged.drafter.target_layer_ids) as adapter:
            logits = packaged.target(ids).logits.float()[0]
            states = adapter.pop_context_hidden_states()
        block = packaged.drafter.block_size
        places = list(range(ids.shape[1] // 3, ids.shape[1] - block - 1, every))
        previous = torch.stack([ids[0, place : place + block] for place in places])[None]
        target_logits = torch.cat([logits[place : place + block] for place in places])
        noise = KeyedNoise(number).add_to(torch.zeros_like(target_logits)[None], [0], [0])[0]
        for name, drafter in ways.items():
            head, token_ids = drafter.markov_head, drafter.draft_token_ids
            assert head is not None and token_ids is not None  # the shipped drafters have both
            out = drafter(states, ids[:, places], torch.tensor([places]), previous, adapter)
            base = drafter.draft_head(adapter)(out.hidden_states)[0].flatten(0, 1)
            full = (base + head.project(out.latents)[0].flatten(0, 1)).float()
            for top in TOPS if name == "bf16" else (0,):
                chances = accepted(full, base, token_ids, target_logits, noise, top)
                found.setdefault(f"{name}, {top or 'all'}", []).append(chances.view(-1, block, 3))
    print(f"| drafter, tokens corrected | {' | '.join(RULES)} | tau, {' | tau, '.join(RULES)} |")
    print("| --- |" + " ---: |" * 6)
    for name, parts in found.items():
        by_slot = torch.cat(parts).mean(0)
        numbers = [*by_slot.mean(0).tolist(), *(1 + by_slot.cumprod(0).sum(0)).tolist()]
        print(f"| {name} | " + " | ".join(f"{one:.3f}" for one in numbers) + " |")


if __name__ == "__main__":
    typer.run(main)
