"""What a drafter's hidden states mean: logits over the tokens that it can propose.

D hidden, V_draft proposable tokens; `*` any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dspark_hf.generation.targets.adapter import TargetAdapter, cap_logits


class DraftHead:
    """Base logits over the proposable tokens, through the drafter's own head or the target's.

    Args:
        drafter: what has `config`, `device`, `draft_token_ids` and, where it owns one, `lm_head`.
        target: the target, which lends its head otherwise.
        known: `rows` of an earlier one, taken again if they are the same.
    """

    def __init__(self, drafter: Any, target: TargetAdapter, known: nn.Linear | None = None):
        self._target = target
        self._own_head = drafter.lm_head if drafter.config.owns_head else None
        self._is_bare = drafter.config.borrows_bare_weights
        self._cap = drafter.config.final_logit_softcapping
        self._ids = drafter.draft_token_ids
        self._device = drafter.device
        # a full copy of the head is never made; the rows of a reduced vocabulary are few
        self.rows: nn.Linear | None = None
        if self._ids is not None and self._own_head is None:
            self.rows = _layer_of_rows(target.head_rows(self._ids), known)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return logits `(*, V_draft)` on the drafter's device for hidden states `(*, D)`."""
        # of slots that are but some of their block, one row's too, PyTorch's CPU kernels make a product for each row
        # with a copy of the weights: in bf16 ten to a hundred times as long
        logits = self._logits(hidden_states.flatten(0, -2))
        return logits.unflatten(0, hidden_states.shape[:-1])

    def _logits(self, hidden_states: Tensor) -> Tensor:
        if self._own_head is not None:
            return cap_logits(self._own_head(hidden_states), self._cap)
        if self.rows is not None:
            weight = self.rows.weight
            logits = self.rows(hidden_states.to(device=weight.device, dtype=weight.dtype))
            return (logits if self._is_bare else self._target.finish_logits(logits)).to(self._device)
        head = self._target.head_bare if self._is_bare else self._target.head
        logits = head(hidden_states).to(self._device)
        return logits if self._ids is None else logits[..., self._ids]


def _layer_of_rows(rows: tuple[Tensor, Tensor | None] | None, known: nn.Linear | None) -> nn.Linear | None:
    """Return the layer of weight rows and biases: a `known` one on a CPU if it holds the same."""
    if rows is None:
        return None
    weight, bias = rows
    if known is not None and _is_same(known.weight, weight) and _is_same(known.bias, bias):
        return known
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return layer


def _is_same(known: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two tensors on a CPU hold the same; elsewhere the host would wait for the answer."""
    if known is None or other is None:
        return known is other
    are_here = known.device.type == "cpu" == other.device.type
    # those of a call in inference mode are of no use to whoever differentiates
    return are_here and not known.is_inference() and known.dtype is other.dtype and torch.equal(known, other)
