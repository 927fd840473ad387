"""Requests that share the rounds of one ragged batch, each with its own rules.

b rows in the batch, k drafts so far, W positions of a verify pass, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from dspark_hf.generation.call.criteria import StopRules
from dspark_hf.generation.call.processors import ProcessorChain
from dspark_hf.generation.call.sequences import Sequences
from dspark_hf.generation.call.streamers import OrderedStream
from dspark_hf.generation.compat import pad_token_id
from dspark_hf.generation.drafting.context import DeferredContext
from dspark_hf.generation.drafting.interface import DraftContext, DraftedBlock
from dspark_hf.generation.requests.request import Request
from dspark_hf.generation.rounds import Rounds, fill_empty, without_gaps
from dspark_hf.generation.scheduling.interface import Batch, Schedule
from dspark_hf.generation.statistics import Round, SpeculationStatistics
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.interface import TargetPass
from dspark_hf.generation.targets.ragged import RaggedTarget


class RequestRow:
    """One request: its text, its rules, and what went wrong with it.

    Args:
        request: whose row this is.
        input_ids: the prompt `(1, P)`.
        generation_config: what `generate` prepared, as are the next two.
        logits_processor: the processors.
        stopping_criteria: the criteria.
        streamer: what is fed the tokens, or None.
        num_drafts: drafts per round at most.
    """

    def __init__(
        self,
        request: Request,
        input_ids: Tensor,
        *,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        num_drafts: int,
    ):
        self.request = request
        self.sequences = Sequences(input_ids, pad_token_id(generation_config))
        self.is_sampling = bool(generation_config.do_sample)
        self.statistics = SpeculationStatistics()
        self.statistics.start_rows(1)
        self.is_finished = False
        self.error: Exception | None = None
        self._rules = StopRules(stopping_criteria, self.sequences)
        self._eos_token_ids = self._rules.eos_token_ids
        self._processors = ProcessorChain(logits_processor, self.sequences, self._eos_token_ids)
        self._stream = OrderedStream(streamer, self.sequences)
        self._num_drafts = num_drafts

    @property
    def limit(self) -> int:
        """How many drafts the next round may verify."""
        room = self._rules.max_length
        return self._num_drafts if room is None else min(self._num_drafts, room - self.sequences.lengths[0] - 1)

    @property
    def has_processors(self) -> bool:
        """Whether scores differ from logits."""
        return not self._processors.is_empty

    @property
    def is_over(self) -> bool:
        """Whether the row leaves the batch."""
        return self.is_finished or self.error is not None or self.request.is_cancelled

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        # what a user brought with one request is no reason to end the others
        try:
            yield
        except Exception as error:
            self.error = error

    def scores(self, ahead: Tensor, logits: Tensor) -> Tensor:
        """Return the scores `(1, W, V)` of `logits`; once the request has failed, the logits as they are."""
        if self.error is None:
            with self._guarded():
                return self._processors([0], ahead, logits)
        return logits.float()

    def draft_scores(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Return the scores `(1, V)` of a slot's `logits`, behind the drafts `(1, k)`."""
        scores = self.scores(drafted, logits[:, None])[:, 0]
        return fill_empty(scores, self._eos_token_ids)

    def commit(self, tokens: Tensor, num_accepted: int, can_be_drawn: bool) -> int:
        """Append `tokens` `(n,)` up to where the row stops. Returns how many that are: none once it has failed."""
        if self.is_sampling and not can_be_drawn and self.error is None:
            self.error = ValueError("`logits_processor` must leave a token that can be sampled, got none.")
        if self.error is not None:
            return 0
        count = 0
        with self._guarded():
            (stop,) = self._rules.first_stops([0], [tokens], lambda length: None)
            count = stop or len(tokens)
            self.is_finished = stop is not None
            self.sequences.append(0, tokens[:count])
            self.statistics.add_tokens(0, [i < num_accepted for i in range(count)])
            self._stream.flush({})
        return count


class RequestBatch(Rounds):
    """Rows of requests in the caches of target and drafter.

    Args:
        adapter: the target, entered by the caller.
        target: the rows' run of the target.
        context: the drafter's context for them.
        schedule: how many drafts are made and verified.
        rows: the requests.
        statistics: where passes and rounds are counted, over all requests.
    """

    _target: RaggedTarget

    def __init__(
        self,
        adapter: TargetAdapter,
        target: RaggedTarget,
        context: DraftContext,
        schedule: Schedule,
        rows: list[RequestRow],
        statistics: SpeculationStatistics,
    ):
        super().__init__(adapter, statistics)
        self.rows = rows
        self._target = target
        self._context = DeferredContext(context)
        self._schedule = schedule
        self._left: list[RequestRow] = []

    def append(self, other: RequestBatch) -> None:
        """Take over the rows of another batch, which ends there."""
        # first, so that whatever fails below is known to concern them too
        self.rows = self.rows + other.rows
        self._num_processed = self._num_processed + other._num_processed
        self._target.append_rows(other._target)
        self._context.append_rows(other._context)

    def take_left(self) -> list[RequestRow]:
        """Return the rows that have left since the last call."""
        left, self._left = self._left, []
        return left

    def drop_cancelled(self) -> None:
        """Let requests go that were cancelled since the last round."""
        self._drop_rows()

    def _batch(self) -> Batch:
        lengths = [row.sequences.lengths[0] for row in self.rows]
        limits = tuple(self._room_for_drafts(index, row.limit) for index, row in enumerate(self.rows))
        return Batch(limits, len(self.rows), max(lengths))

    def _anchors(self) -> Tensor:
        return torch.cat([row.sequences.last_tokens([0]) for row in self.rows])

    def _scores(self, target_pass: TargetPass, drafts: Tensor) -> Tensor:
        device = self.rows[0].sequences.device
        logits, drafts = target_pass.logits.to(device), drafts.to(device)
        if not any(row.has_processors for row in self.rows):
            return logits
        return torch.cat([row.scores(drafts[i : i + 1], logits[i : i + 1]) for i, row in enumerate(self.rows)])

    def _draft_scores(self, logits: Tensor, drafted: Tensor) -> Tensor:
        device = self.rows[0].sequences.device
        logits, drafted = logits.to(device), drafted.to(device)
        if not any(row.has_processors for row in self.rows):
            return logits
        rows = enumerate(self.rows)
        return torch.cat([row.draft_scores(logits[i : i + 1], drafted[i : i + 1]) for i, row in rows])

    def _probabilities(self, scores: Tensor) -> Tensor | None:
        if not any(row.is_sampling for row in self.rows):
            return None
        are_sampling = torch.tensor([row.is_sampling for row in self.rows], device=scores.device)
        # a greedy row draws from its best token alone; so does one without a distribution, which fails afterwards
        is_drawn = are_sampling.view(-1, *[1] * (scores.ndim - 2)) & _can_be_drawn(scores)
        best = torch.zeros_like(scores, dtype=torch.float32).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
        return torch.where(is_drawn[..., None], torch.softmax(scores.float(), dim=-1), best)

    def _commit(
        self,
        target_pass: TargetPass,
        scores: Tensor,
        new_tokens: list[Tensor],
        num_accepted: list[int],
        *,
        is_prefill: bool = False,
    ) -> list[int]:
        for row in self.rows:
            row.statistics.num_target_passes += 1
        drawn = [[True] * scores.shape[1]] * len(self.rows)
        if any(row.is_sampling for row in self.rows):
            drawn = _can_be_drawn(scores).tolist()
        return [
            # what stands behind the first rejected draft was not drawn from
            row.commit(new_tokens[i], num_accepted[i], all(drawn[i][: num_accepted[i] + 1]))
            for i, row in enumerate(self.rows)
        ]

    def _count_round(
        self, drafted: DraftedBlock | None, num_verified: list[int], num_accepted: list[int], num_kept: list[int]
    ) -> None:
        num_drafted, confidence = (0, None) if drafted is None else (drafted.num_drafts, drafted.confidence)
        for i, row in enumerate(self.rows):
            verified, accepted = num_verified[i], num_accepted[i]
            beliefs = None if confidence is None else confidence[i : i + 1]
            row.statistics.rounds.append(Round((0,), num_drafted, beliefs, (verified,), (accepted,)))
            if num_kept[i]:
                for statistics in (row.statistics, self._statistics):
                    statistics.add_round(num_drafted, verified, accepted, num_kept[i])

    def _drop_rows(self) -> None:
        # asked once: another thread may cancel at any time
        are_over = [row.is_over for row in self.rows]
        live = without_gaps([i for i, is_over in enumerate(are_over) if not is_over])
        if len(live) == len(self.rows):
            return
        self._left += [row for row, is_over in zip(self.rows, are_over, strict=True) if is_over]
        if live:
            self._select_rows(live, self.rows[0].sequences.device)
        self.rows = [self.rows[i] for i in live]


def _can_be_drawn(scores: Tensor) -> Tensor:
    """Return whether a softmax over `scores` `(*, V)` is a distribution, `(*)`."""
    return torch.isfinite(scores.amax(-1))
