"""The frozen target's hidden states, computed online and kept in memory up to a stated size.

T tokens, D hidden, M tapped layers, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_hf.generation.target import TargetAdapter


@dataclass
class SequenceStates:
    """What a drafter learns from one sequence.

    `context` `(T, M * D)` are the tapped hidden states, `last` `(T, D)` the states that enter the output head, both
    bf16; `lse` `(T,)`, fp32, is the log-sum-exp of the logits over the whole vocabulary.
    """

    context: Tensor
    last: Tensor
    lse: Tensor

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.context, self.last, self.lse))


class StateSource:
    """Compute sequences' states and remember them while they fit.

    Args:
        target: the frozen target.
        dtype: what the target computes in; autocast where it differs from the weights.
        max_cache_bytes: memory for remembered states; 0 computes every sequence anew.
    """

    def __init__(self, target: TargetAdapter, *, dtype: torch.dtype, max_cache_bytes: int):
        self._target = target
        self._dtype = dtype
        self._cache: dict[int, SequenceStates] = {}
        self._free_bytes = max_cache_bytes

    def get(self, index: int, input_ids: Tensor) -> SequenceStates:
        """Return the states of sequence number `index`, whose tokens are `input_ids` `(T,)`."""
        if index in self._cache:
            return self._cache[index]
        states = self._compute(input_ids)
        if states.num_bytes <= self._free_bytes:
            self._free_bytes -= states.num_bytes
            self._cache[index] = states
        return states

    @torch.no_grad()
    def _compute(self, input_ids: Tensor, chunk_size: int = 256) -> SequenceStates:
        model = self._target.model
        with self._target, torch.autocast(model.device.type, self._dtype, enabled=self._dtype != model.dtype):
            output = model.get_decoder()(input_ids=input_ids[None].to(model.device), use_cache=False)
            context = self._target.pop_context_hidden_states()[0].to(torch.bfloat16)
            # rounded first: probabilities taken from the stored states sum to one with a sum over the same states
            last = output.last_hidden_state[0].to(torch.bfloat16)
            # the whole vocabulary only ever exists for one chunk of positions
            lse = [self._target.head(part).float().logsumexp(-1) for part in last.split(chunk_size)]
        return SequenceStates(context, last, torch.cat(lse))
