"""What a drafter's hidden states mean: logits over the tokens that it can propose.

D hidden, V_draft proposable tokens; `*` any leading dimensions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dspark_hf.generation.targets.adapter import TargetAdapter, cap_logits


class DraftHead:
    """Base logits over the proposable tokens, through the drafter's own head or the target's.

    Args:
        drafter: what has `config`, `device`, `draft_token_ids` and, where it owns one, `lm_head`.
        target: the target, which lends its head otherwise.
    """

    def __init__(self, drafter: Any, target: TargetAdapter):
        self._target = target
        self._own_head = drafter.lm_head if drafter.config.owns_head else None
        self._is_bare = drafter.config.borrows_bare_weights
        self._cap = drafter.config.final_logit_softcapping
        self._ids = drafter.draft_token_ids
        self._device = drafter.device
        # a full copy of the head is never made; the rows of a reduced vocabulary are few
        self.rows = target.head_rows(self._ids) if self._ids is not None and self._own_head is None else None

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
            weight, bias = self.rows
            states = hidden_states.to(device=weight.device, dtype=weight.dtype)
            logits = nn.functional.linear(states, weight, bias)
            return (logits if self._is_bare else self._target.finish_logits(logits)).to(self._device)
        head = self._target.head_bare if self._is_bare else self._target.head
        logits = head(hidden_states).to(self._device)
        return logits if self._ids is None else logits[..., self._ids]
