"""What the decoding loop asks of a drafter, and the sequential part of drafting (Eq. 4).

B batch, K drafts, V vocab, D hidden, M tapped layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dspark_hf.generation.statistics import SpeculationStatistics

if TYPE_CHECKING:
    from dspark_hf.generation.target import TargetAdapter

# (slot k, logits [B, V], drafted so far [B, k]) -> (token ids [B], probabilities [B, V] or None when greedy)
Sampler = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass
class DraftedBlock:
    """Drafts of one round.

    `token_ids` `(B, K)`; `probs` `(B, K, V)`, fp32, the distributions the tokens were really drawn from, or None when
    greedy; `confidence` `(B, K)`, fp32, the estimated chance that draft k is accepted given that its prefix is, or
    None without a confidence head; `margins` `(B, K)`, fp32, how far the best logit of each slot lies above the
    second, filled in by the decoding loop where a scheduler wants it. `confidence[:, k]` and `margins[:, k]` depend on
    the drafts before k only.
    """

    token_ids: Tensor
    probs: Tensor | None
    confidence: Tensor | None
    margins: Tensor | None = None

    @property
    def num_drafts(self) -> int:
        """Number K of drafts per row."""
        return self.token_ids.shape[1]


class DraftContext(ABC):
    """What a drafter remembers of the sequences being generated."""

    @abstractmethod
    def extend(self, hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int]) -> None:
        """Append hidden states `(B, T, M * D)` of the target at `positions` `(B, T)`: `num_tokens[r]` of row r."""

    @abstractmethod
    def draft(self, anchor_ids: Tensor, positions: Tensor, num_drafts: int, sampler: Sampler) -> DraftedBlock:
        """Return `num_drafts` drafts after the anchors `(B)`, which stand at `positions` `(B)`."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` `(B')` of the batch, in that order."""

    def append_rows(self, other: Any) -> None:
        """Append the rows of another context of the same drafter; only `generate_stream` asks for it."""
        raise NotImplementedError(
            "`drafter` must have contexts with `append_rows` for `generate_stream`, got "
            f"{type(self).__name__} without. Implement it, or use `target.generate`."
        )


class Drafter(ABC):
    """A model that proposes blocks of tokens from the target's hidden states.

    `scheduler` says how many drafts are made and verified: a name, a `Scheduler`, or None for the adaptive one; what
    a call says goes before. `last_statistics` holds what the last call of `generate` measured. Several threads may
    use a drafter at once; what each of them measured is in its output with `return_dict_in_generate=True`.
    """

    # Transformers evaluates annotations when the class is made, and schedulers know drafters
    scheduler: Any = None
    last_statistics: SpeculationStatistics | None = None

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Number of drafts the drafter was trained to propose per round."""

    @property
    @abstractmethod
    def target_layer_ids(self) -> list[int]:
        """Target decoder layers whose outputs the drafter reads."""

    @abstractmethod
    def check_target(self, target: TargetAdapter) -> None:
        """Raise a `ValueError` if this drafter was not made for `target`."""

    @abstractmethod
    def start(self, target: TargetAdapter, batch_size: int) -> DraftContext:
        """Return an empty context for `batch_size` sequences."""


def sample_block(
    base_logits: Tensor,
    hidden_states: Tensor,
    anchor_ids: Tensor,
    sampler: Sampler,
    *,
    markov_head: Any,
    expand_logits: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Draw the drafts of a block left to right (Eq. 4).

    Takes `base_logits` `(B, K, V_draft)` and `hidden_states` `(B, K, D)` of the backbone, `anchor_ids` `(B)`, and
    `expand_logits`, which spreads proposable tokens over the target's vocabulary.

    Returns the drafts `(B, K)`, their distributions `(B, K, V)` (None when greedy) and the previous token of every
    slot `(B, K)`.
    """
    previous = anchor_ids
    state = None if markov_head is None else markov_head.initial_state(hidden_states[:, 0])
    drafted: list[Tensor] = []
    probs: list[Tensor] = []
    for k in range(base_logits.shape[1]):
        logits = base_logits[:, k]
        if markov_head is not None:
            latent, state = markov_head.step(previous, hidden_states[:, k], state)
            logits = logits + markov_head.project(latent)
        so_far = torch.stack(drafted, dim=1) if drafted else anchor_ids.new_empty(len(anchor_ids), 0)
        token_ids, token_probs = sampler(k, expand_logits(logits), so_far)
        drafted.append(token_ids)
        if token_probs is not None:
            probs.append(token_probs)
        previous = token_ids
    token_ids = torch.stack(drafted, dim=1)
    previous_ids = torch.cat([anchor_ids[:, None], token_ids[:, :-1]], dim=1)
    return token_ids, torch.stack(probs, dim=1) if probs else None, previous_ids
