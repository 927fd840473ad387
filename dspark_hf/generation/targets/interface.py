"""What a forward pass of the target yields, and what the decoding loop asks of the target's cache.

B batch, T processed tokens, W positions with logits, V vocab, D hidden, M tapped layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass
class TargetPass:
    """One forward pass.

    `logits` `(B, W, V)` of the last W tokens; `context_hidden_states` `(B, T, M * D)` and `positions` `(B, T)` of all
    processed tokens; `num_tokens`: how many of the T are real, per row; `hidden_states` and `attentions`: the model's
    own outputs if asked for, else None.
    """

    logits: Tensor
    context_hidden_states: Tensor
    positions: Tensor
    num_tokens: list[int]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class TargetState(Protocol):
    """The target with its cache over one call of `generate`."""

    def prefill(self) -> TargetPass:
        """Process the prompts, with logits of their last token."""
        ...

    def verify(self, token_ids: Tensor) -> TargetPass:
        """Process `token_ids` `(B, W)`: every row's anchor and drafts."""
        ...

    def keep(self, num_kept: Sequence[int]) -> None:
        """Take back all but the first `num_kept[r]` tokens of the last `verify`, per row."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch, in that order."""
        ...

    def append_rows(self, other: Any) -> None:
        """Append the rows of another run of the same target, which ends there; only `generate_stream` asks for it."""
        ...

    def returned_cache(self) -> Any:
        """Return the cache in Transformers' own form."""
        ...

    def release(self) -> None:
        """Leave a cache of the user's as it was before a pass whose tokens were not kept, and ready for other uses."""
        ...
