"""Rounds of decoding: draft, schedule, verify, commit, roll back (arXiv 2607.05147, Section 3).

b rows in the batch, K drafts, W = 1 + K positions of a verify pass, V vocab.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from dspark_hf.generation.drafting.context import DeferredContext
from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling.estimator import top_margin
from dspark_hf.generation.scheduling.interface import Batch, Outcome, Schedule
from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.interface import TargetPass, TargetState
from dspark_hf.generation.verification import verify, verify_greedy


class Rounds(ABC):
    """Decode rows round by round. What the rows are, and by which rules they write, is up to the subclass.

    Args:
        adapter: the target, entered by the caller.
        statistics: where passes and their time are counted.
    """

    # set before the first pass
    _target: TargetState
    _context: DeferredContext
    _schedule: Schedule

    def __init__(self, adapter: TargetAdapter, statistics: SpeculationStatistics):
        self._adapter = adapter
        self._statistics = statistics
        # how much of each row the target's cache holds
        self._num_processed: list[int] = []
        self._margins: list[Tensor] = []

    def prefill(self) -> None:
        """Process the prompts and commit every row's first token."""
        with self._statistics.timed("prefill_seconds", self._adapter.model.device):
            target_pass = self._target.prefill()
        self._statistics.num_target_passes += 1
        last = torch.tensor(target_pass.num_tokens, device=target_pass.positions.device) - 1
        self._num_processed = (target_pass.positions.gather(1, last[:, None])[:, 0] + 1).tolist()
        self._context.extend(target_pass.context_hidden_states, target_pass.positions, target_pass.num_tokens)
        scores = self._scores(target_pass, target_pass.positions[:, :0])
        choices = _draw(scores[:, 0], self._probabilities(scores[:, 0]))
        self._commit(target_pass, scores, list(choices[:, None]), [0] * len(choices), is_prefill=True)
        self._drop_rows()

    def round(self) -> None:
        """Draft, schedule, verify, commit and roll back once."""
        statistics, device = self._statistics, self._adapter.model.device
        start, drafting, verifying = perf_counter(), statistics.draft_seconds, statistics.verify_seconds
        batch = self._batch()
        is_typical = not self._context.is_behind
        anchors = self._anchors()
        drafted = self._draft(anchors, self._schedule.num_drafts(batch))
        num_verified = [0] * len(anchors) if drafted is None else self._schedule.admit(drafted, batch)
        tokens = _verified_tokens(anchors, drafted, max(num_verified))
        with statistics.timed("verify_seconds", device):
            target_pass = self._target.verify(tokens.to(device), None if drafted is None else drafted.parents)
        statistics.num_target_passes += 1
        scores = self._scores(target_pass, tokens[:, 1:])
        num_accepted, bonus = self._accept(drafted, num_verified, scores)
        new_tokens = [
            torch.cat([tokens[i, 1 : 1 + count].to(bonus.device), bonus[i : i + 1]])
            for i, count in enumerate(num_accepted)
        ]
        num_kept = self._commit(target_pass, scores, new_tokens, num_accepted)
        self._num_processed = [old + new for old, new in zip(self._num_processed, num_kept, strict=True)]
        self._count_round(drafted, num_verified, num_accepted, num_kept)
        self._target.keep([range(count) for count in num_kept])
        self._context.extend(target_pass.context_hidden_states, target_pass.positions, num_kept)
        self._drop_rows()
        seconds, drafting = perf_counter() - start, statistics.draft_seconds - drafting
        statistics.other_seconds += seconds - drafting - (statistics.verify_seconds - verifying)
        num_drafted = 0 if drafted is None else drafted.num_drafts
        self._schedule.observe(
            Outcome(batch, num_drafted, num_verified, num_accepted, drafting, seconds - drafting, is_typical)
        )

    def _draft(self, anchors: Tensor, num_drafts: int) -> DraftedBlock | None:
        """Return the drafts of all rows, or None for a round without."""
        if num_drafts < 1:
            return None
        positions = torch.tensor(self._num_processed, device=anchors.device)
        self._margins = []
        with self._statistics.timed("draft_seconds", self._adapter.model.device):
            self._context.catch_up()
            drafted = self._context.context.draft(anchors, positions, num_drafts, self._sample_draft)
        if drafted.parents is not None:
            raise ValueError(
                "`parents` of a drafted block must be None, got a tree. Decoding accepts chains only: draft one token "
                "for each position."
            )
        if self._margins:
            drafted = replace(drafted, margins=torch.stack(self._margins, dim=1))
        return drafted

    def _sample_draft(self, slot: int, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._schedule.wants_margins:
            self._margins.append(top_margin(logits))
        scores = self._draft_scores(logits, drafted)
        probs = self._probabilities(scores)
        return _draw(scores, probs).to(logits.device), probs

    def _accept(
        self, drafted: DraftedBlock | None, num_verified: list[int], scores: Tensor
    ) -> tuple[list[int], Tensor]:
        """Return how many drafts each row accepts, and every row's bonus token `(b,)`."""
        num_drafts = scores.shape[1] - 1
        if drafted is None or num_drafts == 0:
            return [0] * len(num_verified), _draw(scores[:, 0], self._probabilities(scores[:, 0]))
        limits = torch.tensor(num_verified, device=scores.device)
        draft_ids = drafted.token_ids[:, :num_drafts].to(scores.device)
        target_probs = self._probabilities(scores)
        if drafted.probs is None or target_probs is None:
            num_accepted, bonus = verify_greedy(draft_ids, scores.argmax(-1), limits)
        else:
            draft_probs = drafted.probs[:, :num_drafts].to(scores.device)
            num_accepted, bonus = verify(draft_ids, draft_probs, target_probs, limits)
        return num_accepted.tolist(), bonus

    def _room_for_drafts(self, index: int, wanted: int) -> int:
        """Return how many of `wanted` drafts stand at positions that the target knows, for the row at `index`."""
        limit = getattr(self._adapter.config, "max_position_embeddings", None)
        length = self._num_processed[index] + 1
        # a text that is longer already goes on as it does without drafts
        return wanted if limit is None or length > limit else min(wanted, limit - length)

    def _select_rows(self, kept: Sequence[int], device: torch.device) -> None:
        """Keep only the rows at `kept` in the caches."""
        index = torch.tensor(list(kept), device=device)
        self._target.select_rows(index)
        self._context.select_rows(index)
        self._num_processed = [self._num_processed[i] for i in kept]

    @abstractmethod
    def _batch(self) -> Batch:
        """Return what a schedule is told of the rows."""

    @abstractmethod
    def _anchors(self) -> Tensor:
        """Return every row's last committed token, `(b,)`."""

    @abstractmethod
    def _scores(self, target_pass: TargetPass, drafts: Tensor) -> Tensor:
        """Return the scores `(b, W, V)` after processors, of a pass over `drafts` `(b, W - 1)` and what precedes."""

    @abstractmethod
    def _draft_scores(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Return the scores `(b, V)` of a slot's `logits` `(b, V)`, `drafted` `(b, k)` being the drafts before it."""

    @abstractmethod
    def _probabilities(self, scores: Tensor) -> Tensor | None:
        """Return what tokens are drawn from, fp32, shaped as `scores` `(b, *, V)`; None if all rows are greedy."""

    @abstractmethod
    def _commit(
        self,
        target_pass: TargetPass,
        scores: Tensor,
        new_tokens: list[Tensor],
        num_accepted: list[int],
        *,
        is_prefill: bool = False,
    ) -> list[int]:
        """Append every row's tokens up to where it stops. Returns how many tokens each row got."""

    @abstractmethod
    def _count_round(
        self, drafted: DraftedBlock | None, num_verified: list[int], num_accepted: list[int], num_kept: list[int]
    ) -> None:
        """Count a round."""

    @abstractmethod
    def _drop_rows(self) -> None:
        """Take rows that are over out of the batch."""


def without_gaps(live: Sequence[int]) -> list[int]:
    """Return the indices of `live` rows, the last ones put where rows before them left gaps: others need not move."""
    staying = {index for index in live if index < len(live)}
    moving = [index for index in live if index >= len(live)]
    return [index if index in staying else moving.pop(0) for index in range(len(live))]


def _draw(scores: Tensor, probs: Tensor | None) -> Tensor:
    """Return one token per row of `scores` `(b, V)`."""
    return scores.argmax(-1) if probs is None else torch.multinomial(probs, num_samples=1).squeeze(-1)


def _verified_tokens(anchors: Tensor, drafted: DraftedBlock | None, num_drafts: int) -> Tensor:
    if drafted is None or num_drafts == 0:
        return anchors[:, None]
    return torch.cat([anchors[:, None], drafted.token_ids[:, :num_drafts].to(anchors.device)], dim=1)


def fill_empty(scores: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """Return draft scores `(b, V)` in which a row without any possible token can draft an end, or 0 if there is none.

    Processors may leave none of the proposable tokens. Any distribution is honest as long as it is the one drawn from.
    """
    only = torch.full_like(scores, float("-inf"))
    # some vocabularies are smaller than the ids of their ends
    only[:, next((token_id for token_id in eos_token_ids if token_id < scores.shape[-1]), 0)] = 0.0
    return torch.where(torch.isneginf(scores).all(-1, keepdim=True), only, scores)
