"""The target's own greedy text, and the hidden states that a drafter could have read of it.

T tokens of a text, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_hf.generation.targets.adapter import TargetAdapter


@dataclass(frozen=True)
class Recorded:
    """A text `(T,)` of prompt and answer, where the answer starts, and hidden states `(1, T, D)` by layer."""

    token_ids: Tensor
    start: int
    states: dict[int, Tensor]

    @property
    def answer(self) -> list[int]:
        """The tokens of the answer."""
        return self.token_ids[self.start :].tolist()


def record(target: Any, prompts: Sequence[Tensor], layer_ids: Sequence[int], *, max_new_tokens: int) -> list[Recorded]:
    """Return what a target answers to prompts `(T,)`, greedily, and what its layers said."""
    return [_record(target, prompt, layer_ids, max_new_tokens) for prompt in prompts]


@torch.no_grad()
def _record(target: Any, prompt: Tensor, layer_ids: Sequence[int], max_new_tokens: int) -> Recorded:
    text = write(target, prompt, max_new_tokens)
    adapter = TargetAdapter(target, layer_ids)
    # of the logits none is needed
    options = {"logits_to_keep": 1} if adapter.accepts("logits_to_keep") else {}
    with adapter:
        adapter.model(input_ids=text[None].to(adapter.device), use_cache=False, **options)
        states = adapter.pop_context_hidden_states().split(adapter.hidden_size, dim=-1)
    return Recorded(text, len(prompt), dict(zip(layer_ids, states, strict=True)))


def write(target: Any, prompt: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
    """Return a prompt `(T,)` and its greedy continuation, on the CPU; `options` go to `generate`."""
    input_ids = prompt[None].to(TargetAdapter(target).device)
    output = target.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=False,
        **options,
    )
    return output[0].cpu()
