"""Requests that share the rounds of one ragged batch, each written by its own rules.

b rows in the batch, k drafts so far, W positions of a verify pass, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from dspark_hf.generation.call.criteria import StopRules
from dspark_hf.generation.call.processors import ProcessorChain, fill_empty
from dspark_hf.generation.call.sequences import Sequences
from dspark_hf.generation.call.streamers import OrderedStream
from dspark_hf.generation.compat import pad_token_id
from dspark_hf.generation.drawing import most_likely
from dspark_hf.generation.noise import KeyedNoise
from dspark_hf.generation.ragged_store import fill_gaps
from dspark_hf.generation.requests.request import Request
from dspark_hf.generation.rows import NewTokens
from dspark_hf.generation.scheduling.interface import Batch
from dspark_hf.generation.statistics import Round, RoundInProgress, SpeculationStatistics
from dspark_hf.generation.targets.interface import TargetPass


class RequestRow:
    """One request: its text, its rules, and what went wrong with it.

    Args:
        request: whose row this is.
        input_ids: the prompt `(1, P)`.
        generation_config: what `generate` prepared, as are the next two.
        logits_processor: the processors.
        stopping_criteria: the criteria.
        streamer: what is fed the tokens, or None.
        num_drafts: the drafter's drafts per round at most.
        num_looked_up: drafts that the row may look up at most.
        prompt: the prompt without padding, to look them up in.
        is_invariant: whether sampled tokens are drawn by noise that the request's seed and the place alone decide.
        seed: that seed; None draws one from torch's global generator.
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
        num_looked_up: int = 0,
        prompt: Sequence[int] = (),
        is_invariant: bool = False,
        seed: int | None = None,
    ):
        self.request = request
        self.sequences = Sequences(input_ids, pad_token_id(generation_config))
        self.is_sampling = bool(generation_config.do_sample)
        self._noise = KeyedNoise(seed) if self.is_sampling and is_invariant else None
        self.statistics = SpeculationStatistics()
        self.statistics.start_rows(1)
        self.is_finished = False
        self.error: Exception | None = None
        self._rules = StopRules(stopping_criteria, self.sequences)
        self._eos_token_ids = self._rules.eos_token_ids
        self._processors = ProcessorChain(logits_processor, self.sequences, self._eos_token_ids)
        self._stream = OrderedStream(streamer, self.sequences)
        self._num_drafts = num_drafts
        self._num_looked_up = num_looked_up
        self.prompt = prompt

    @property
    def limit(self) -> int:
        """How many of the drafter's drafts the next round may verify."""
        return self._cut(self._num_drafts)

    @property
    def room(self) -> int:
        """How many drafts that are looked up the next round may verify."""
        return self._cut(self._num_looked_up)

    def _cut(self, num_drafts: int) -> int:
        room = self._rules.max_length
        return num_drafts if room is None else min(num_drafts, room - self.sequences.lengths[0] - 1)

    @property
    def has_processors(self) -> bool:
        """Whether scores differ from logits."""
        return not self._processors.is_empty

    @property
    def may_remember(self) -> bool:
        """Whether a processor may remember its calls."""
        return self._processors.may_remember

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

    def scores_at(self, ahead: Tensor, logits: Tensor) -> Tensor:
        """Return the scores `(1, V)` of `logits` `(1, V)` behind `ahead` `(1, k)`, which is to stay."""
        if self.error is None:
            with self._guarded():
                return self._processors.at([0], ahead, logits)
        return logits.float()

    @property
    def takes_the_best(self) -> bool:
        """Whether the token with the best score is written: greedy, or with noise among the scores."""
        return not self.is_sampling or self._noise is not None

    def with_noise(self, scores: Tensor, ahead: int, token_ids: Tensor | None) -> Tensor:
        """Return `scores` `(1, W, V)` with noise if the row draws by it."""
        if self._noise is None:
            return scores.float()
        start = self.sequences.lengths[0] - self.sequences.prompt_length + ahead
        return self._noise.add_to(scores, [0], [start], token_ids)

    def is_end(self, token_id: int) -> bool:
        """Return whether a token ends the text."""
        return token_id in self._eos_token_ids

    @property
    def goes_by_ids(self) -> bool:
        """Whether draft scores are only to be had of the whole vocabulary, in the order of the ids."""
        return self._processors.goes_by_ids

    @property
    def num_left(self) -> int | None:
        """How many of a slot's best tokens a draft can be; None for any number."""
        return self._processors.num_left

    def draft_scores(self, logits: Tensor, drafted: Tensor, *, are_all: bool = True) -> Tensor:
        """Return the scores `(1, V)` of a slot's `logits`, behind the drafts `(1, k)`."""
        scores = self.scores(drafted, logits[:, None])[:, 0]
        return fill_empty(scores, self._eos_token_ids if are_all else ())

    def commit(self, ids: list[int], tokens: Tensor, num_accepted: int, source: str, can_be_drawn: bool) -> int:
        """Append `tokens` `(n,)`, known as `ids`, accepted drafts of `source` first, up to where the row stops.

        Returns how many that are: none once it has failed.
        """
        if self.is_sampling and not can_be_drawn and self.error is None:
            self.error = ValueError("`logits_processor` must leave a token that can be sampled, got none.")
        if self.error is not None:
            return 0
        count = 0
        with self._guarded():
            (stop,) = self._rules.first_stops([0], NewTokens([ids], [tokens]), lambda length: None)
            count = stop or len(tokens)
            self.is_finished = stop is not None
            self.sequences.append(0, tokens[:count])
            self.statistics.add_tokens(0, count, num_accepted, source)
            self._stream.flush({})
        return count


class RequestRows:
    """Rows of requests, each written by its own rules.

    Args:
        rows: the requests.
        statistics: where rounds are counted, over all requests.
    """

    def __init__(self, rows: list[RequestRow], statistics: SpeculationStatistics):
        self.rows = rows
        self._statistics = statistics
        self._left: list[RequestRow] = []

    def append(self, other: RequestRows) -> None:
        """Take over the requests of other rows, which end there."""
        self.rows = self.rows + other.rows

    def take_left(self) -> list[RequestRow]:
        """Return the rows that have left since the last call."""
        left, self._left = self._left, []
        return left

    def batch(self) -> Batch:
        """Return what a schedule is told of the rows."""
        limits = tuple(row.limit for row in self.rows)
        rooms = tuple(row.room for row in self.rows)
        return Batch(limits, len(self.rows), max(row.sequences.lengths[0] for row in self.rows), rooms)

    def anchors(self) -> Tensor:
        """Return every row's last committed token, `(b,)`."""
        return torch.cat([row.sequences.last_tokens([0]) for row in self.rows])

    @property
    def goes_by_ids(self) -> bool:
        """Whether draft scores are only to be had of the whole vocabulary, in the order of the ids."""
        return any(row.goes_by_ids for row in self.rows)

    @property
    def num_left(self) -> int | None:
        """How many of a slot's best tokens a draft of any row can be; None for any number."""
        counts = [row.num_left for row in self.rows]
        return None if None in counts else max(count for count in counts if count is not None)

    def draft_scores(self, logits: Tensor, drafted: Tensor, *, are_all: bool = True) -> Tensor:
        """Return the scores `(b, V)` of a slot's `logits` `(b, V)`, `drafted` `(b, k)` being the drafts before it.

        Unless they `are_all`, the logits are those of some tokens, in any order.
        """
        device = self.rows[0].sequences.device
        logits, drafted = logits.to(device), drafted.to(device)
        if not any(row.has_processors or row.is_sampling for row in self.rows):
            return logits
        rows = enumerate(self.rows)
        parts = ((row, logits[i : i + 1], drafted[i : i + 1]) for i, row in rows)
        return torch.cat([row.draft_scores(part, before, are_all=are_all) for row, part, before in parts])

    def scores(self, target_pass: TargetPass, drafts: Tensor) -> Tensor:
        """Return the scores `(b, W, V)` after processors, of a pass over `drafts` `(b, W - 1)` and what precedes."""
        device = self.rows[0].sequences.device
        logits, drafts = target_pass.logits.to(device), drafts.to(device)
        if not any(row.has_processors for row in self.rows):
            return logits
        return torch.cat([row.scores(drafts[i : i + 1], logits[i : i + 1]) for i, row in enumerate(self.rows)])

    @property
    def accept_in_steps(self) -> bool:
        """Whether a request has a processor that may remember its calls."""
        return any(row.may_remember for row in self.rows)

    def live(self) -> list[int]:
        """Return the indices of the rows that still write: all that have not left."""
        return list(range(len(self.rows)))

    def scores_at(self, target_pass: TargetPass, drafts: Tensor, going: Sequence[int]) -> Tensor:
        """Return the scores `(b, V)` of a pass behind its first `drafts` `(b, k)`, zeros but for the rows `going`."""
        device = self.rows[0].sequences.device
        logits, drafts = target_pass.logits[:, drafts.shape[1]].to(device), drafts.to(device)
        scores = torch.zeros_like(logits, dtype=torch.float32)
        for i in going:
            scores[i : i + 1] = self.rows[i].scores_at(drafts[i : i + 1], logits[i : i + 1])
        return scores

    def going_on(self, going: Sequence[int], accepted: Sequence[bool], tokens: Tensor) -> list[int]:
        """Return which of the rows `going` look at a further draft: each for itself."""
        return [i for i in going if accepted[i] and not self.is_end(i, int(tokens[i]))]

    def is_end(self, index: int, token_id: int) -> bool:
        """Return whether a token ends the text of a row."""
        return self.rows[index].is_end(token_id)

    def with_noise(self, scores: Tensor, ahead: int, token_ids: Tensor | None = None) -> Tensor:
        """Return `scores` `(b, W, V)` with noise where rows draw by it, from `ahead` tokens behind their text on."""
        if not any(row.is_sampling and row.takes_the_best for row in self.rows):
            return scores
        ids = [
            token_ids if token_ids is None or token_ids.ndim == 1 else token_ids[i : i + 1]
            for i in range(len(self.rows))
        ]
        return torch.cat([row.with_noise(scores[i : i + 1], ahead, ids[i]) for i, row in enumerate(self.rows)])

    def probabilities(self, scores: Tensor) -> Tensor | None:
        """Return what tokens are drawn from, fp32, shaped as `scores` `(b, *, V)`; None if all rows take the best."""
        if all(row.takes_the_best for row in self.rows):
            return None
        are_sampling = torch.tensor([not row.takes_the_best for row in self.rows], device=scores.device)
        # a greedy row draws from its best token alone; so does one without a distribution, which fails afterwards
        is_drawn = are_sampling.view(-1, *[1] * (scores.ndim - 2)) & _can_be_drawn(scores)
        best = torch.zeros_like(scores, dtype=torch.float32).scatter_(-1, most_likely(scores)[..., None], 1.0)
        return torch.where(is_drawn[..., None], torch.softmax(scores.float(), dim=-1), best)

    def commit(
        self, target_pass: TargetPass, scores: Tensor, new_tokens: NewTokens, record: RoundInProgress | None
    ) -> list[int]:
        """Append every row's tokens up to where it stops, and count the round; the prefill has no `record`.

        Returns how many tokens each row got.
        """
        for row in self.rows:
            row.statistics.num_target_passes += 1
        drawn = [[True] * scores.shape[1]] * len(self.rows)
        if any(row.is_sampling for row in self.rows):
            drawn = _can_be_drawn(scores).tolist()
        num_accepted = [0] * len(self.rows) if record is None else record.num_accepted
        sources = ["model" if record is None else record.drafts_of(i)[0] for i in range(len(self.rows))]
        num_kept = [
            # what stands behind the first rejected draft was not drawn from
            row.commit(
                new_tokens.ids[i],
                new_tokens.tensors[i],
                num_accepted[i],
                sources[i],
                all(drawn[i][: num_accepted[i] + 1]),
            )
            for i, row in enumerate(self.rows)
        ]
        if record is not None:
            self._count(record, num_kept)
        return num_kept

    def _count(self, record: RoundInProgress, num_kept: list[int]) -> None:
        confidence = record.confidence
        for i, row in enumerate(self.rows):
            verified, accepted = record.num_verified[i], record.num_accepted[i]
            beliefs = None if confidence is None else confidence[i : i + 1]
            source, num_drafted = record.drafts_of(i)
            looked_up = record.num_looked_up[i : i + 1]
            row.statistics.rounds.append(Round((0,), record.num_drafted, beliefs, (verified,), (accepted,), looked_up))
            if num_kept[i]:
                for statistics in (row.statistics, self._statistics):
                    statistics.add_round(num_drafted, verified, accepted, num_kept[i], source)

    def leave(self) -> list[int]:
        """Let rows that are over leave the batch; return the indices of those that stay, or none to leave all be."""
        # asked once: another thread may cancel at any time
        are_over = [row.is_over for row in self.rows]
        staying = fill_gaps([i for i, is_over in enumerate(are_over) if not is_over])
        if len(staying) == len(self.rows):
            return []
        self._left += [row for row, is_over in zip(self.rows, are_over, strict=True) if is_over]
        self.rows = [self.rows[i] for i in staying]
        return staying


def _can_be_drawn(scores: Tensor) -> Tensor:
    """Return whether a softmax over `scores` `(*, V)` is a distribution, `(*)`."""
    return torch.isfinite(scores.amax(-1))
