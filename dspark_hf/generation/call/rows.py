"""The rows of one call of `generate`: a fixed batch under common rules.

B rows of the batch, b rows still in it, k drafts so far, W positions of a verify pass, V vocab.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from dspark_hf.generation.call.criteria import StopRules
from dspark_hf.generation.call.outputs import DSparkGenerateOutput, OutputRecorder
from dspark_hf.generation.call.processors import ProcessorChain, fill_empty
from dspark_hf.generation.call.sequences import Sequences
from dspark_hf.generation.call.streamers import OrderedStream
from dspark_hf.generation.compat import pad_token_id
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.drawing import NO_DISTRIBUTION
from dspark_hf.generation.noise import KeyedNoise
from dspark_hf.generation.ragged_store import fill_gaps
from dspark_hf.generation.rows import NewTokens
from dspark_hf.generation.scheduling.interface import Batch, CallInfo
from dspark_hf.generation.statistics import Round, RoundInProgress, SpeculationStatistics
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.interface import TargetPass, TargetState


class CallRows:
    """Rows that start together, are written by the same rules, and are returned as one tensor.

    Args:
        input_ids: the prompts `(B, P)`.
        generation_config: what `generate` prepared, as are the next two.
        logits_processor: the processors.
        stopping_criteria: the criteria.
        streamer: what is fed the tokens, or None.
        num_drafts: the drafter's drafts per round at most.
        num_looked_up: drafts that a row may look up at most.
        returns_cache: whether the cache is the user's, who will go on with it.
        has_fixed_size: whether the batch keeps its rows to the end.
        is_invariant: whether sampled tokens are drawn by noise that seed, row and place alone decide.
        has_streams_first: whether the model's own hidden states are `(n, B, T, D)`.
    """

    def __init__(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        *,
        num_drafts: int,
        num_looked_up: int = 0,
        returns_cache: bool,
        has_fixed_size: bool = False,
        is_invariant: bool = False,
        has_streams_first: bool = False,
    ):
        self.statistics = SpeculationStatistics()
        self.statistics.start_rows(len(input_ids))
        self._num_drafts = num_drafts
        self._num_looked_up = num_looked_up
        self._is_sampling = bool(generation_config.do_sample)
        self._noise = KeyedNoise() if self._is_sampling and is_invariant else None
        self._sequences = Sequences(input_ids, pad_token_id(generation_config))
        self._rules = StopRules(stopping_criteria, self._sequences)
        self._eos_token_ids = self._rules.eos_token_ids
        self._processors = ProcessorChain(logits_processor, self._sequences, self._eos_token_ids)
        self._has_processors = not self._processors.is_empty
        self.accept_in_steps = self._processors.may_remember
        # then they are shown the whole batch, whose rows must have the same length
        self._stop_together = self._rules.may_compare_rows and len(input_ids) > 1
        self._advance_together = self._stop_together or (self.accept_in_steps and len(input_ids) > 1)
        self._streams = streamer is not None
        self._stream = OrderedStream(streamer, self._sequences)
        self._recorder = OutputRecorder(generation_config, len(input_ids), has_streams_first=has_streams_first)
        self._returns_cache = self._recorder.returns_dict or returns_cache
        self._has_fixed_size = has_fixed_size
        # rows in the order in which the caches hold them
        self._rows = list(range(len(input_ids)))
        self._stopped_at: dict[int, int] = {}

    def describe(self, adapter: TargetAdapter, drafter: Drafter) -> CallInfo:
        """Return what a scheduler is told when the call starts."""
        return CallInfo(
            target=adapter,
            drafter=drafter,
            num_rows=self._sequences.batch_size,
            max_drafts=self._num_drafts or self._num_looked_up,
            prompt_length=self._sequences.prompt_length,
            is_sampling=self._is_sampling,
        )

    @property
    def are_done(self) -> bool:
        """Whether every row has its final length."""
        return not any(self._is_live(row) for row in range(self._sequences.batch_size))

    def _is_live(self, row: int) -> bool:
        if row not in self._stopped_at:
            return True
        if self._advance_together and not self._rules.pads_finished_rows:
            return len(self._stopped_at) < self._sequences.batch_size
        return self._sequences.lengths[row] < self._common_length()

    def _common_length(self) -> int:
        """Return the length that stopped rows still grow to.

        Without an EOS criterion plain `generate` pads nothing and writes all rows on until the last one stops. A
        stopped row waits here until that length is known.
        """
        if self._rules.pads_finished_rows or len(self._stopped_at) < self._sequences.batch_size:
            return 0
        return max(self._stopped_at.values())

    def _room(self, row: int) -> int:
        """Return how many tokens a row may still get; 1 for a row that waits."""
        if row in self._stopped_at and not self._stop_together:
            return max(self._common_length() - self._sequences.lengths[row], 1)
        limit = self._rules.max_length
        return sys.maxsize if limit is None else limit - self._sequences.lengths[row]

    def batch(self) -> Batch:
        """Return what a schedule is told of the rows."""
        # where a criterion of the user's ends a row, the others' processors must be shown its padding at once
        must_wait = self.accept_in_steps and self._advance_together and self._rules.has_others
        rooms = [0 if must_wait else self._room(row) - 1 for row in self._rows]
        limits = tuple(min(self._num_drafts, room) for room in rooms)
        looked_up = tuple(min(self._num_looked_up, room) for room in rooms) if self._num_looked_up else ()
        num_live = sum(self._is_live(row) for row in self._rows)
        return Batch(limits, num_live, max(self._sequences.lengths[row] for row in self._rows), looked_up)

    def anchors(self) -> Tensor:
        """Return every row's last committed token, `(b,)`."""
        return self._sequences.last_tokens(self._rows)

    @property
    def goes_by_ids(self) -> bool:
        """Whether draft scores are only to be had of the whole vocabulary, in the order of the ids."""
        return self._processors.goes_by_ids

    @property
    def num_left(self) -> int | None:
        """How many of a slot's best tokens a draft can be; None for any number."""
        return self._processors.num_left

    def draft_scores(self, logits: Tensor, drafted: Tensor, *, are_all: bool = True) -> Tensor:
        """Return the scores `(b, V)` of a slot's `logits` `(b, V)`, `drafted` `(b, k)` being the drafts before it.

        Unless they `are_all`, the logits are those of some tokens, in any order.
        """
        if not self._has_processors and not self._is_sampling:
            return logits
        device = self._sequences.device
        scores = self._processors(self._rows, drafted.to(device), logits[:, None].to(device))[:, 0]
        # an end, if there is one: what would be drafted after a token that is not allowed is of no use
        return fill_empty(scores, self._eos_token_ids if are_all else ())

    def scores(self, target_pass: TargetPass, drafts: Tensor) -> Tensor:
        """Return the scores `(b, W, V)` after processors, of a pass over `drafts` `(b, W - 1)` and what precedes."""
        if not self._has_processors and not self._is_sampling and not self._recorder.wants_scores:
            # the raw logits are all that is needed
            return target_pass.logits
        device = self._sequences.device
        return self._processors(self._rows, drafts.to(device), target_pass.logits.to(device))

    def live(self) -> list[int]:
        """Return the indices of the rows that still write."""
        return [index for index, row in enumerate(self._rows) if self._is_live(row)]

    def scores_at(self, target_pass: TargetPass, drafts: Tensor, going: Sequence[int]) -> Tensor:
        """Return the scores `(b, V)` of a pass behind its first `drafts` `(b, k)`; rows that are over have zeros."""
        device, live = self._sequences.device, self.live()
        rows, ahead = [self._rows[index] for index in live], drafts[live].to(device)
        is_end = torch.isin(ahead, torch.tensor(self._eos_token_ids, dtype=torch.long, device=device))
        # a row that has ended in this very block is padded
        ahead = ahead.masked_fill(is_end.long().cumsum(-1) - is_end.long() > 0, self._sequences.pad_token_id)
        logits = target_pass.logits[live, drafts.shape[1]].to(device)
        processed = self._processors.at(rows, ahead, logits)
        scores = processed.new_zeros(len(drafts), logits.shape[-1])
        scores[live] = processed
        return scores

    def going_on(self, going: Sequence[int], accepted: Sequence[bool], tokens: Tensor) -> list[int]:
        """Return which of the rows `going` look at a further draft: none once one of them rejected its own."""
        if not all(accepted[index] for index in going):
            return []
        return [index for index in going if not self.is_end(index, int(tokens[index]))]

    def is_end(self, index: int, token_id: int) -> bool:
        """Return whether a token ends the text of a row."""
        return token_id in self._eos_token_ids

    def with_noise(self, scores: Tensor, ahead: int, token_ids: Tensor | None = None) -> Tensor:
        """Return `scores` `(b, W, V)` with noise where rows draw by it, from `ahead` tokens behind their text on."""
        if self._noise is None:
            return scores
        # prompts and their padding do not count
        starts = [self._sequences.lengths[row] - self._sequences.prompt_length + ahead for row in self._rows]
        return self._noise.add_to(scores, self._rows, starts, token_ids)

    def probabilities(self, scores: Tensor) -> Tensor | None:
        """Return what tokens are drawn from, fp32, shaped as `scores` `(b, *, V)`; None where the best is taken."""
        return torch.softmax(scores.float(), dim=-1) if self._is_sampling and self._noise is None else None

    def commit(
        self, target_pass: TargetPass, scores: Tensor, new_tokens: NewTokens, record: RoundInProgress | None
    ) -> list[int]:
        """Append every row's tokens up to where it stops, and count the round; the prefill has no `record`.

        Returns how many tokens each row got.
        """
        if self._stop_together and record is not None:
            # what a row would get beyond the others counts as not accepted
            common = min(len(new_tokens.ids[index]) for index in self.live())
            record.num_accepted = [min(count, common - 1) for count in record.num_accepted]
        if self._noise is not None:
            _check_drawn(scores, [0] * len(scores) if record is None else record.num_accepted)
        pairs = zip(self._rows, new_tokens.ids, strict=True)
        counts = [len(ids) if self._is_live(row) else 0 for row, ids in pairs]
        if self._recorder.returns_dict:
            for index, row in enumerate(self._rows):
                self._recorder.add(row, index, counts[index], target_pass, scores, is_prefill=record is None)
        counts = self._cut(counts, new_tokens)
        num_accepted = [0] * len(counts) if record is None else record.num_accepted
        for index, row in enumerate(self._rows):
            if counts[index]:
                self._sequences.append(row, new_tokens.tensors[index][: counts[index]])
            if self._recorder.returns_dict:
                self._recorder.trim(row, self._sequences.lengths[row] - self._sequences.prompt_length)
            source = "model" if record is None else record.drafts_of(index)[0]
            self.statistics.add_tokens(row, counts[index], num_accepted[index], source)
        if self._streams:
            self._stream.flush(self._stopped_at if self._rules.pads_finished_rows else {})
        if record is not None:
            self._count(record, counts)
        return counts

    def _cut(self, counts: list[int], new_tokens: NewTokens) -> list[int]:
        """Return how many of the `new_tokens` each row gets, and remember where rows stop."""
        if self._stop_together:
            return self._cut_together(new_tokens)
        stops = self._rules.first_stops(self._rows, new_tokens, self._scores_until)
        for index, row in enumerate(self._rows):
            if row in self._stopped_at and not self._advance_together:
                counts[index] = min(counts[index], max(self._common_length() - self._sequences.lengths[row], 0))
        for index, row in enumerate(self._rows):
            stop = stops[index]
            if stop is not None and row not in self._stopped_at:
                counts[index] = stop
                self._stopped_at[row] = self._sequences.lengths[row] + stop
        return counts

    def _cut_together(self, new_tokens: NewTokens) -> list[int]:
        live = self.live()
        theirs = NewTokens([new_tokens.ids[i] for i in live], [new_tokens.tensors[i] for i in live])
        rows = [self._rows[index] for index in live]
        count, stops = self._rules.common_stop(rows, theirs, self._stopped_at, self._scores_until)
        self._stopped_at |= {row: self._sequences.lengths[row] + count for row in stops}
        return [count if index in live else 0 for index in range(len(self._rows))]

    def _scores_until(self, length: int) -> tuple[Tensor, ...] | None:
        return self._recorder.scores_until(length - self._sequences.prompt_length)

    def _count(self, record: RoundInProgress, num_kept: list[int]) -> None:
        verified, accepted = record.num_verified, record.num_accepted
        self.statistics.rounds.append(
            Round(
                tuple(self._rows),
                record.num_drafted,
                record.confidence,
                tuple(verified),
                tuple(accepted),
                record.num_looked_up,
            )
        )
        for index, kept in enumerate(num_kept):
            if kept:
                source, num_drafted = record.drafts_of(index)
                self.statistics.add_round(
                    num_drafted, verified[index], accepted[index], kept, source, record.num_tried
                )

    def leave(self) -> list[int]:
        """Let rows that are over leave the batch; return the indices of those that stay, or none to leave all be."""
        # not where their cache is to be returned, or they may have to write on
        if self._returns_cache or self._has_fixed_size or not self._rules.pads_finished_rows:
            return []
        staying = fill_gaps([index for index, row in enumerate(self._rows) if row not in self._stopped_at])
        if not staying or len(staying) == len(self._rows):
            return []
        self._rows = [self._rows[i] for i in staying]
        return staying

    def finish(self, target: TargetState) -> Tensor | DSparkGenerateOutput:
        """Return what `generate` returns."""
        self._stream.end()
        sequences = self._sequences.padded()
        cache = target.returned_cache(sequences) if self._returns_cache else None
        if not self._recorder.returns_dict:
            return sequences
        return self._recorder.build(sequences, cache, self.statistics)


def _check_drawn(scores: Tensor, num_accepted: Sequence[int]) -> None:
    """Raise the error of plain sampling where tokens were drawn from scores `(b, W, V)` that are no distribution."""
    can_be_drawn = torch.isfinite(scores.amax(-1)).tolist()
    # what stands behind the first rejected draft was not drawn from
    if not all(all(row[: count + 1]) for row, count in zip(can_be_drawn, num_accepted, strict=True)):
        raise RuntimeError(NO_DISTRIBUTION)
