"""What `generate` runs: a fixed batch under common rules, decoded round by round.

B rows of the batch, b rows still in it, k drafts so far, W positions of a verify pass, V vocab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer

from dspark_hf.generation.call.checks import Knobs, check_request, read_knobs
from dspark_hf.generation.call.criteria import StopRules
from dspark_hf.generation.call.outputs import DSparkGenerateOutput, OutputRecorder
from dspark_hf.generation.call.processors import ProcessorChain
from dspark_hf.generation.call.sequences import Sequences
from dspark_hf.generation.call.streamers import OrderedStream
from dspark_hf.generation.compat import CACHE_KEY, pad_token_id, was_given_by_user
from dspark_hf.generation.drafting.context import DeferredContext
from dspark_hf.generation.drafting.interface import DraftedBlock, Drafter
from dspark_hf.generation.rounds import Rounds, fill_empty, without_gaps
from dspark_hf.generation.scheduling.interface import Batch, Call, Scheduler
from dspark_hf.generation.statistics import Round, SpeculationStatistics
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.cropped import SingleRowTarget
from dspark_hf.generation.targets.interface import RowwiseCache, TargetPass, TargetState
from dspark_hf.generation.targets.ragged import RaggedTarget


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
    check_request(
        model, input_ids, generation_config, model_kwargs, num_drafts=drafter.block_size, synced_gpus=synced_gpus
    )
    knobs = read_knobs(generation_config, drafter, model, scheduler)
    adapter = TargetAdapter(model, drafter.target_layer_ids)
    drafter.check_target(adapter)
    with adapter:
        run = _Run(adapter, drafter, knobs, input_ids, logits_processor, stopping_criteria, generation_config)
        run.start(streamer, model_kwargs)
        try:
            run.prefill()
            while not run.is_done:
                run.round()
            return run.finish()
        finally:
            # a round that a user's code or Ctrl-C ended leaves no drafts in the user's cache
            run.release()


class _Run(Rounds):
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
        super().__init__(adapter, SpeculationStatistics())
        self._drafter = drafter
        self._knobs = knobs
        self._config = generation_config
        self._is_sampling = bool(generation_config.do_sample)
        self._sequences = Sequences(input_ids, pad_token_id(generation_config))
        self._rules = StopRules(stopping_criteria, self._sequences)
        self._eos_token_ids = self._rules.eos_token_ids
        self._processors = ProcessorChain(logits_processor, self._sequences, self._eos_token_ids)
        self._recorder = OutputRecorder(generation_config, len(input_ids))
        self._statistics.start_rows(len(input_ids))
        # there from the start, so that a streamer can ask where a token came from
        drafter.last_statistics = self._statistics
        # rows in the order in which the caches hold them
        self._rows = list(range(len(input_ids)))
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
        """Prepare caches, drafter and schedule."""
        self._stream = OrderedStream(streamer, self._sequences)
        self._returns_cache = self._recorder.returns_dict or was_given_by_user(model_kwargs[CACHE_KEY])
        self._target = self._target_state(model_kwargs)
        self._context = DeferredContext(self._drafter.start(self._adapter, self._sequences.batch_size))
        self._schedule = self._knobs.scheduler.start(self._call())

    def _target_state(self, model_kwargs: dict[str, Any]) -> TargetState:
        mask = model_kwargs.get("attention_mask")
        ids = self._sequences.padded()
        has_rows = isinstance(model_kwargs[CACHE_KEY], RowwiseCache)
        if len(ids) == 1 and not has_rows and (mask is None or bool(mask.all())):
            return SingleRowTarget(self._adapter, ids, self._config, model_kwargs)
        return RaggedTarget(self._adapter, ids, self._config, model_kwargs, widest=self._knobs.num_drafts + 1)

    def _call(self) -> Call:
        return Call(
            target=self._adapter,
            drafter=self._drafter,
            num_rows=self._sequences.batch_size,
            max_drafts=self._knobs.num_drafts,
            prompt_length=self._sequences.prompt_length,
            is_sampling=self._is_sampling,
        )

    def _batch(self) -> Batch:
        wanted = [min(self._knobs.num_drafts, self._room(row) - 1) for row in self._rows]
        limits = tuple(self._room_for_drafts(index, count) for index, count in enumerate(wanted))
        num_live = sum(self._is_live(row) for row in self._rows)
        return Batch(limits, num_live, max(self._sequences.lengths[row] for row in self._rows))

    def _anchors(self) -> Tensor:
        return self._sequences.last_tokens(self._rows)

    def _room(self, row: int) -> int:
        """Return how many tokens a row may still get; 1 for a row that waits."""
        if row in self._stopped_at:
            return max(self._common_length() - self._sequences.lengths[row], 1)
        limit = self._rules.max_length
        return self._knobs.num_drafts + 1 if limit is None else limit - self._sequences.lengths[row]

    def _draft_scores(self, logits: Tensor, drafted: Tensor) -> Tensor:
        scores = logits
        if not self._processors.is_empty:
            device = self._sequences.device
            scores = self._processors(self._rows, drafted.to(device), logits[:, None].to(device))[:, 0]
        # an end, if there is one: what would be drafted after a token that is not allowed is of no use
        return fill_empty(scores, self._eos_token_ids)

    def _scores(self, target_pass: TargetPass, drafts: Tensor) -> Tensor:
        if self._processors.is_empty and not self._is_sampling and not self._recorder.wants_scores:
            # the raw logits are all that is needed
            return target_pass.logits
        device = self._sequences.device
        return self._processors(self._rows, drafts.to(device), target_pass.logits.to(device))

    def _probabilities(self, scores: Tensor) -> Tensor | None:
        return torch.softmax(scores.float(), dim=-1) if self._is_sampling else None

    def _commit(
        self,
        target_pass: TargetPass,
        scores: Tensor,
        new_tokens: list[Tensor],
        num_accepted: list[int],
        *,
        is_prefill: bool = False,
    ) -> list[int]:
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
            self._statistics.add_tokens(row, [i < num_accepted[index] for i in range(counts[index])])
        self._stream.flush(self._stopped_at if self._rules.pads_finished_rows else {})
        return counts

    def _scores_until(self, length: int) -> tuple[Tensor, ...] | None:
        return self._recorder.scores_until(length - self._sequences.prompt_length)

    def _count_round(
        self, drafted: DraftedBlock | None, num_verified: list[int], num_accepted: list[int], num_kept: list[int]
    ) -> None:
        num_drafted, confidence = (0, None) if drafted is None else (drafted.num_drafts, drafted.confidence)
        self._statistics.rounds.append(
            Round(tuple(self._rows), num_drafted, confidence, tuple(num_verified), tuple(num_accepted))
        )
        for verified, accepted, kept in zip(num_verified, num_accepted, num_kept, strict=True):
            if kept:
                self._statistics.add_round(num_drafted, verified, accepted, kept)

    def _drop_rows(self) -> None:
        # not where their cache is to be returned, or they may have to write on
        if self._returns_cache or not self._rules.pads_finished_rows:
            return
        live = without_gaps([index for index, row in enumerate(self._rows) if row not in self._stopped_at])
        if live and len(live) < len(self._rows):
            self._select_rows(live, self._sequences.device)
            self._rows = [self._rows[i] for i in live]

    def finish(self) -> Tensor | DSparkGenerateOutput:
        """Return what `generate` returns."""
        self._stream.end()
        sequences = self._sequences.padded()
        cache = self._target.returned_cache() if self._returns_cache else None
        if not self._recorder.returns_dict:
            return sequences
        return self._recorder.build(sequences, cache, self._statistics)

    def release(self) -> None:
        """Leave the user's cache without anything of a round that was not finished."""
        self._target.release()
