"""The decoding loop: draft, schedule, verify, commit, roll back (arXiv 2607.05147, Section 3).

B rows of the batch, b rows still in it, K drafts, W = 1 + K positions of a verify pass, V vocab.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer

from dspark_hf.generation.deferred import DeferredContext
from dspark_hf.generation.drafting import DraftedBlock, Drafter
from dspark_hf.generation.integration import CACHE_KEY, pad_token_id, was_given_by_user
from dspark_hf.generation.outputs import DSparkGenerateOutput, OutputRecorder
from dspark_hf.generation.passes import TargetPass, TargetState
from dspark_hf.generation.processing import ProcessorChain
from dspark_hf.generation.ragged import RaggedTarget
from dspark_hf.generation.requests import Knobs, check_request, read_knobs
from dspark_hf.generation.rowwise import RowwiseCache, RowwiseTarget
from dspark_hf.generation.scheduling.estimator import top_margin
from dspark_hf.generation.scheduling.interface import Batch, Call, Outcome, Scheduler
from dspark_hf.generation.sequences import Sequences
from dspark_hf.generation.single_row import SingleRowTarget
from dspark_hf.generation.statistics import Round, SpeculationStatistics
from dspark_hf.generation.stopping import StopRules
from dspark_hf.generation.streaming import OrderedStream
from dspark_hf.generation.target import TargetAdapter
from dspark_hf.generation.verification import verify, verify_greedy


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    drafter: Drafter,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    synced_gpus: bool = False,
    inputs_tensor: Tensor | None = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    scheduler: Scheduler | str | None = None,
    **model_kwargs: Any,
) -> Tensor | DSparkGenerateOutput:
    """Generate with a drafter: the same output as plain `generate`, in fewer passes of the target.

    The arguments are those that `generate` hands to its decoding methods, and the scheduler, which on the way through
    `assistant_model=` comes with the generation configuration. Greedy output is token-identical where the target's
    arithmetic does not depend on the number of tokens per pass (fp32); sampled output follows the target's
    distribution exactly.

    Returns the token ids `(B, length)`, or a `DSparkGenerateOutput` with `return_dict_in_generate=True`.

    Raises:
        ValueError: before any work, if the request cannot be served exactly; the message says why.
    """
    check_request(model, generation_config, model_kwargs, synced_gpus)
    knobs = read_knobs(generation_config, drafter, model, scheduler)
    adapter = TargetAdapter(model, drafter.target_layer_ids)
    drafter.check_target(adapter)
    with adapter:
        run = _Run(adapter, drafter, knobs, input_ids, logits_processor, stopping_criteria, generation_config)
        run.start(streamer, model_kwargs)
        while not run.is_done:
            run.round()
        return run.finish()


class _Run:
    """One call of `generate`: its rows, its caches and its rules."""

    def __init__(
        self,
        adapter: TargetAdapter,
        drafter: Drafter,
        knobs: Knobs,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ):
        self._adapter = adapter
        self._drafter = drafter
        self._knobs = knobs
        self._config = generation_config
        self._is_sampling = bool(generation_config.do_sample)
        self._sequences = Sequences(input_ids, pad_token_id(generation_config))
        self._rules = StopRules(stopping_criteria, self._sequences)
        self._eos_token_ids = self._rules.eos_token_ids
        self._processors = ProcessorChain(logits_processor, self._sequences, self._eos_token_ids)
        self._recorder = OutputRecorder(generation_config, len(input_ids))
        self._statistics = SpeculationStatistics()
        self._statistics.start_rows(len(input_ids))
        # there from the start, so that a streamer can ask where a token came from
        drafter.last_statistics = self._statistics
        # rows in the order in which the caches hold them; how much of each the target's cache holds
        self._rows = list(range(len(input_ids)))
        self._num_processed = [0] * len(input_ids)
        self._stopped_at: dict[int, int] = {}

    @property
    def is_done(self) -> bool:
        """Whether every row has its final length."""
        return not any(self._is_live(row) for row in range(self._sequences.batch_size))

    def _is_live(self, row: int) -> bool:
        return row not in self._stopped_at or self._sequences.lengths[row] < self._common_length()

    def _common_length(self) -> int:
        """Return the length that stopped rows still grow to.

        Without an EOS criterion plain `generate` pads nothing and writes all rows on until the last one stops. A
        stopped row waits here until that length is known.
        """
        if self._rules.pads_finished_rows or len(self._stopped_at) < self._sequences.batch_size:
            return 0
        return max(self._stopped_at.values())

    def start(self, streamer: BaseStreamer | None, model_kwargs: dict[str, Any]) -> None:
        """Process the prompts and commit every row's first token."""
        self._stream = OrderedStream(streamer, self._sequences)
        self._returns_cache = self._recorder.returns_dict or was_given_by_user(model_kwargs[CACHE_KEY])
        self._target = self._target_state(model_kwargs)
        self._context = DeferredContext(self._drafter.start(self._adapter, self._sequences.batch_size))
        self._schedule = self._knobs.scheduler.start(self._call())
        with self._statistics.timed("prefill_seconds", self._adapter.model.device):
            target_pass = self._target.prefill()
        self._statistics.num_target_passes += 1
        last = torch.tensor(target_pass.num_tokens, device=target_pass.positions.device) - 1
        self._num_processed = (target_pass.positions.gather(1, last[:, None])[:, 0] + 1).tolist()
        self._context.extend(target_pass.context_hidden_states, target_pass.positions, target_pass.num_tokens)
        scores = self._scores(target_pass, self._sequences.padded()[:, :0])
        choices = self._choose((target_pass.logits if scores is None else scores)[:, 0])
        self._commit(target_pass, scores, list(choices[:, None]), [0] * len(choices), is_prefill=True)
        self._drop_finished_rows()

    def _target_state(self, model_kwargs: dict[str, Any]) -> TargetState:
        mask = model_kwargs.get("attention_mask")
        ids = self._sequences.padded()
        if isinstance(model_kwargs[CACHE_KEY], RowwiseCache):
            return RowwiseTarget(self._adapter, ids, self._config, model_kwargs, self._knobs.num_drafts + 1)
        if len(ids) == 1 and (mask is None or bool(mask.all())):
            return SingleRowTarget(self._adapter, ids, self._config, model_kwargs)
        return RaggedTarget(self._adapter, ids, self._config, model_kwargs)

    def _call(self) -> Call:
        return Call(
            target=self._adapter,
            drafter=self._drafter,
            num_rows=self._sequences.batch_size,
            max_drafts=self._knobs.num_drafts,
            prompt_length=self._sequences.prompt_length,
            is_sampling=self._is_sampling,
        )

    def round(self) -> None:
        """Draft, schedule, verify, commit and roll back once."""
        statistics, device = self._statistics, self._adapter.model.device
        start, drafting, verifying = perf_counter(), statistics.draft_seconds, statistics.verify_seconds
        batch = self._batch()
        is_typical = not self._context.is_behind
        anchors = self._sequences.last_tokens(self._rows)
        drafted = self._draft(anchors, self._schedule.num_drafts(batch))
        num_verified = [0] * len(self._rows) if drafted is None else self._schedule.admit(drafted, batch)
        tokens = self._verified_tokens(anchors, drafted, max(num_verified))
        with statistics.timed("verify_seconds", device):
            target_pass = self._target.verify(tokens.to(device))
        statistics.num_target_passes += 1
        scores = self._scores(target_pass, tokens[:, 1:])
        num_accepted, bonus = self._accept(drafted, num_verified, target_pass.logits if scores is None else scores)
        new_tokens = [
            torch.cat([tokens[i, 1 : 1 + count].to(bonus.device), bonus[i : i + 1]])
            for i, count in enumerate(num_accepted)
        ]
        num_kept = self._commit(target_pass, scores, new_tokens, num_accepted)
        self._count_round(drafted, num_verified, num_accepted, num_kept)
        self._target.keep(num_kept)
        self._context.extend(target_pass.context_hidden_states, target_pass.positions, num_kept)
        self._drop_finished_rows()
        seconds, drafting = perf_counter() - start, statistics.draft_seconds - drafting
        statistics.other_seconds += seconds - drafting - (statistics.verify_seconds - verifying)
        num_drafted = 0 if drafted is None else drafted.token_ids.shape[1]
        self._schedule.observe(
            Outcome(batch, num_drafted, num_verified, num_accepted, drafting, seconds - drafting, is_typical)
        )

    def _batch(self) -> Batch:
        limits = tuple(min(self._knobs.num_drafts, self._room(row) - 1) for row in self._rows)
        num_live = sum(self._is_live(row) for row in self._rows)
        return Batch(limits, num_live, max(self._sequences.lengths[row] for row in self._rows))

    def _draft(self, anchors: Tensor, num_drafts: int) -> DraftedBlock | None:
        """Return the drafts of all rows, or None for a round without."""
        if num_drafts < 1:
            return None
        positions = torch.tensor([self._num_processed[row] for row in self._rows], device=anchors.device)
        self._margins: list[Tensor] = []
        with self._statistics.timed("draft_seconds", self._adapter.model.device):
            self._context.catch_up()
            drafted = self._context.context.draft(anchors, positions, num_drafts, self._sample_draft)
        if self._margins:
            drafted = replace(drafted, margins=torch.stack(self._margins, dim=1))
        return drafted

    def _room(self, row: int) -> int:
        """Return how many tokens a row may still get; 1 for a row that waits."""
        if row in self._stopped_at:
            return max(self._common_length() - self._sequences.lengths[row], 1)
        limit = self._rules.max_length
        return self._knobs.num_drafts + 1 if limit is None else limit - self._sequences.lengths[row]

    def _sample_draft(self, slot: int, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor | None]:
        scores = logits
        if self._schedule.wants_margins:
            self._margins.append(top_margin(logits))
        if not self._processors.is_empty:
            device = self._sequences.device
            scores = self._processors(self._rows, drafted.to(device), logits[:, None].to(device))[:, 0]
        # an end, if there is one: what would be drafted after a token that is not allowed is of no use
        scores = _fill_empty(scores, self._eos_token_ids[0] if self._eos_token_ids else 0)
        if not self._is_sampling:
            return scores.argmax(-1).to(logits.device), None
        probs = _probabilities(scores)
        return torch.multinomial(probs, num_samples=1).squeeze(-1).to(logits.device), probs

    def _verified_tokens(self, anchors: Tensor, drafted: DraftedBlock | None, num_drafts: int) -> Tensor:
        if drafted is None or num_drafts == 0:
            return anchors[:, None]
        return torch.cat([anchors[:, None], drafted.token_ids[:, :num_drafts].to(anchors.device)], dim=1)

    def _scores(self, target_pass: TargetPass, drafts: Tensor) -> Tensor | None:
        """Return the processed scores `(b, W, V)`, or None where the raw logits are all that is needed."""
        if self._processors.is_empty and not self._is_sampling and not self._recorder.wants_scores:
            return None
        return self._processors(self._rows, drafts, target_pass.logits.to(self._sequences.device))

    def _choose(self, scores: Tensor) -> Tensor:
        """Return one token per row of `scores` `(b, V)`."""
        if not self._is_sampling:
            return scores.argmax(-1)
        return torch.multinomial(_probabilities(scores), num_samples=1).squeeze(-1)

    def _accept(
        self, drafted: DraftedBlock | None, num_verified: list[int], scores: Tensor
    ) -> tuple[list[int], Tensor]:
        """Return how many drafts each row accepts, and every row's bonus token `(b,)`."""
        num_drafts = scores.shape[1] - 1
        if drafted is None or num_drafts == 0:
            return [0] * len(num_verified), self._choose(scores[:, 0])
        limits = torch.tensor(num_verified, device=scores.device)
        draft_ids = drafted.token_ids[:, :num_drafts].to(scores.device)
        if drafted.probs is None:
            num_accepted, bonus = verify_greedy(draft_ids, scores.argmax(-1), limits)
        else:
            draft_probs = drafted.probs[:, :num_drafts].to(scores.device)
            num_accepted, bonus = verify(draft_ids, draft_probs, _probabilities(scores), limits)
        return num_accepted.tolist(), bonus

    def _commit(
        self,
        target_pass: TargetPass,
        scores: Tensor | None,
        new_tokens: list[Tensor],
        num_accepted: list[int],
        *,
        is_prefill: bool = False,
    ) -> list[int]:
        """Append every live row's tokens up to where it stops. Returns how many tokens each row got."""
        counts = [len(tokens) if self._is_live(row) else 0 for row, tokens in zip(self._rows, new_tokens, strict=True)]
        for index, row in enumerate(self._rows):
            self._recorder.add(row, index, counts[index], target_pass, scores, is_prefill=is_prefill)
        stops = self._rules.first_stops(self._rows, new_tokens, self._scores_until)
        for index, row in enumerate(self._rows):
            if row in self._stopped_at:
                counts[index] = min(counts[index], max(self._common_length() - self._sequences.lengths[row], 0))
        for index, row in enumerate(self._rows):
            stop = stops[index]
            if stop is not None and row not in self._stopped_at:
                counts[index] = stop
                self._stopped_at[row] = self._sequences.lengths[row] + stop
            self._sequences.append(row, new_tokens[index][: counts[index]])
            self._recorder.trim(row, self._sequences.lengths[row] - self._sequences.prompt_length)
            self._num_processed[row] += 0 if is_prefill else counts[index]
            self._statistics.add_tokens(row, [i < num_accepted[index] for i in range(counts[index])])
        self._stream.flush(self._stopped_at if self._rules.pads_finished_rows else {})
        return counts

    def _scores_until(self, length: int) -> tuple[Tensor, ...] | None:
        return self._recorder.scores_until(length - self._sequences.prompt_length)

    def _count_round(
        self, drafted: DraftedBlock | None, num_verified: list[int], num_accepted: list[int], num_kept: list[int]
    ) -> None:
        num_drafted = 0 if drafted is None else drafted.token_ids.shape[1]
        confidence = None if drafted is None else drafted.confidence
        self._statistics.rounds.append(
            Round(tuple(self._rows), num_drafted, confidence, tuple(num_verified), tuple(num_accepted))
        )
        for verified, accepted, kept in zip(num_verified, num_accepted, num_kept, strict=True):
            if kept:
                self._statistics.add_round(num_drafted, verified, accepted, kept)

    def _drop_finished_rows(self) -> None:
        """Take finished rows out of the batch, unless their cache is to be returned or they may have to write on."""
        if self._returns_cache or not self._rules.pads_finished_rows:
            return
        live = [index for index, row in enumerate(self._rows) if row not in self._stopped_at]
        if live and len(live) < len(self._rows):
            index = torch.tensor(live, device=self._sequences.device)
            self._target.select_rows(index)
            self._context.select_rows(index)
            self._rows = [self._rows[i] for i in live]

    def finish(self) -> Tensor | DSparkGenerateOutput:
        """Return what `generate` returns."""
        self._stream.end()
        sequences = self._sequences.padded()
        cache = self._target.returned_cache() if self._returns_cache else None
        if not self._recorder.returns_dict:
            return sequences
        return self._recorder.build(sequences, cache, self._statistics)


def _probabilities(scores: Tensor) -> Tensor:
    return torch.softmax(scores.float(), dim=-1)


def _fill_empty(scores: Tensor, token_id: int) -> Tensor:
    """Return draft scores `(b, V)` in which a row without any possible token can draft `token_id`.

    Processors may leave none of the proposable tokens. Any distribution is honest as long as it is the one drawn from.
    """
    only = torch.full_like(scores, float("-inf"))
    only[:, token_id] = 0.0
    return torch.where(torch.isneginf(scores).all(-1, keepdim=True), only, scores)
