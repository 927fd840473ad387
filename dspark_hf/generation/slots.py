"""Draw the drafts of a round, slot by slot.

B batch, n tokens, V vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_hf.generation.drafting.interface import CandidateSampler
from dspark_hf.generation.drawing import draw_or_best
from dspark_hf.generation.rows import Rows
from dspark_hf.generation.scheduling.estimator import top_margin


class SlotSampler(CandidateSampler):
    """Draw drafts by the rules that rows are written by.

    Args:
        rows: the rows.
        wants_margins: whether to keep how far each slot's best logit lies above the second.
    """

    def __init__(self, rows: Rows, *, wants_margins: bool):
        self._rows = rows
        self._wants_margins = wants_margins
        self._margins: list[Tensor] = []

    def margins(self) -> Tensor | None:
        """Return the margins `(B, K)` of the slots so far, or None if none were wanted."""
        return torch.stack(self._margins, dim=1) if self._margins else None

    @property
    def takes_candidates(self) -> bool:
        """Whether nothing that decides over drafts goes by their ids."""
        return not self._rows.goes_by_ids

    def __call__(self, slot: int, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the drafts `(B,)` of a slot and the distributions `(B, V)` that they were drawn from."""
        return self._draw(slot, logits, drafted, None)

    def among(self, slot: int, logits: Tensor, drafted: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the drafts `(B,)` of a slot and their distributions `(B, n)` over the `candidates`."""
        places, probs = self._draw(slot, logits, drafted, candidates)
        return _ids_at(candidates, places), probs

    def _draw(
        self, slot: int, logits: Tensor, drafted: Tensor, candidates: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return places `(B,)` among `logits` `(B, n)`, and distributions over them."""
        num_left = self._rows.num_left
        if self._wants_margins:
            self._margins.append(top_margin(logits))
        if num_left is None or num_left >= logits.shape[-1] or not self.takes_candidates:
            places, probs = self._draw_all(slot, logits, drafted, candidates, are_all=candidates is None)
            return places.to(logits.device), probs
        # what a top-k would leave: all that follows then works on these few
        best, where = logits.topk(num_left, dim=-1)
        ids = where if candidates is None else candidates.expand(len(where), -1).gather(-1, where)
        places, probs = self._draw_all(slot, best, drafted, ids, are_all=False)
        places = where.gather(-1, places.to(where.device)[:, None]).squeeze(-1)
        if probs is not None:
            probs = probs.new_zeros(logits.shape).scatter_(-1, where.to(probs.device), probs)
        return places, probs

    def _draw_all(
        self, slot: int, logits: Tensor, drafted: Tensor, ids: Tensor | None, *, are_all: bool
    ) -> tuple[Tensor, Tensor | None]:
        scores = self._rows.draft_scores(logits, drafted, are_all=are_all)
        scores = self._rows.with_noise(scores[:, None], slot, ids)[:, 0]
        probs = self._rows.probabilities(scores)
        return draw_or_best(scores, probs, checks=False), probs


def _ids_at(candidates: Tensor, places: Tensor) -> Tensor:
    if candidates.ndim == 1:
        return candidates[places]
    return candidates.gather(-1, places[:, None]).squeeze(-1)
