"""Where two greedy texts part, and how near the two best tokens were there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_hf.generation.targets.adapter import input_device


@dataclass(frozen=True)
class Parting:
    """The place where two texts of one target go different ways.

    Args:
        index: number of new tokens that both share.
        tokens: what each text goes on with; None where it ends.
        best: the target's two best tokens there, in one pass over prompt and shared text.
        logits: theirs.
        step: distance of neighbouring numbers of that size in the target's dtype.
    """

    index: int
    tokens: tuple[int | None, int | None]
    best: tuple[int, int]
    logits: tuple[float, float]
    step: float

    @property
    def num_steps(self) -> float:
        """How far the two best are apart, in the smallest steps that the dtype knows."""
        return abs(self.logits[0] - self.logits[1]) / self.step

    @property
    def is_between_best(self) -> bool:
        """Whether the texts go on with just the two best tokens."""
        return set(self.tokens) == set(self.best)

    def describe(self, tokenizer: Any) -> str:
        """Return a sentence that says where, and between what."""
        first, second = (repr(tokenizer.decode([token])) for token in self.best)
        apart = "a tie" if self.num_steps == 0 else f"{self.num_steps:.0f} rounding steps of {self.step:g} apart"
        chosen = "" if self.is_between_best else "; the texts went on with others than these two"
        return (
            f"They part after {self.index} tokens, where the target's two best were {first} ({self.logits[0]:.3f}) "
            f"and {second} ({self.logits[1]:.3f}): {apart}{chosen}."
        )


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts share before they part."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


@torch.no_grad()
def find_parting(target: Any, prompt_ids: Tensor, first: Sequence[int], second: Sequence[int]) -> Parting | None:
    """Return where two texts that follow the prompt `(T,)` part, or None if they are the same."""
    index = shared_length(first, second)
    if index == len(first) == len(second):
        return None
    shared = torch.tensor(list(first[:index]), dtype=torch.long, device=prompt_ids.device)
    input_ids = torch.cat([prompt_ids, shared])[None].to(input_device(target))
    output = target(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    logits = output.logits[0, -1]
    values, ids = logits.float().topk(2)
    best, second_best = values.tolist()
    # of the model's dtype: some models give fp32 logits of what they computed in bf16
    epsilon = torch.finfo(target.dtype).eps
    step = epsilon * 2.0 ** math.floor(math.log2(max(abs(best), 1e-30)))
    tokens = tuple(text[index] if index < len(text) else None for text in (first, second))
    return Parting(index, (tokens[0], tokens[1]), tuple(ids.tolist()), (best, second_best), step)
