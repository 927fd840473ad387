"""The loop: draft, schedule, verify, commit, roll back (arXiv 2607.05147, Section 3). Read this file first.

b rows in the batch, K drafts, W = 1 + K positions of a verify pass, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer

from dspark_hf.generation.call.checks import check_request
from dspark_hf.generation.call.knobs import read_options
from dspark_hf.generation.call.outputs import DSparkGenerateOutput
from dspark_hf.generation.call.rows import CallRows
from dspark_hf.generation.compat import CACHE_KEY, is_static, was_given_by_user
from dspark_hf.generation.drafting.context import DeferredContext
from dspark_hf.generation.drafting.interface import DraftContext, DraftedBlock, Drafter
from dspark_hf.generation.drafting.lookup import Lookups
from dspark_hf.generation.drawing import draw_or_best, most_likely
from dspark_hf.generation.lean_passes import lean_passes
from dspark_hf.generation.packing import FEW_TOKENS, pack_weights, packed_weights
from dspark_hf.generation.proposing import outcome_of, propose
from dspark_hf.generation.rows import NewTokens, Rows
from dspark_hf.generation.scheduling.interface import Batch, Schedule, Scheduler
from dspark_hf.generation.slots import SlotSampler
from dspark_hf.generation.statistics import RoundInProgress, SpeculationStatistics
from dspark_hf.generation.stepwise import accept_in_steps
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.choosing import choose_target
from dspark_hf.generation.targets.interface import TargetPass, TargetState
from dspark_hf.generation.targets.padding import prompt_tokens
from dspark_hf.generation.targets.static import StaticTarget
from dspark_hf.generation.verification import verify, verify_greedy
from dspark_hf.generation.walking import walk
from dspark_hf.generation.wrappers import row_adapter_options


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
    drafts: str | None = None,
    sampling: str | None = None,
    draft_tree: int | str | None = None,
    **model_kwargs: Any,
) -> Tensor | DSparkGenerateOutput:
    """Generate with a drafter: the same output as plain `generate`, in fewer passes of the target.

    The arguments are those that `generate` hands to its decoding methods, and the scheduler, who drafts, how samples
    are accepted and whether drafts branch, which on the way through `assistant_model=` come with the generation
    configuration. Greedy output is token-identical where the target's arithmetic does not depend on the number of
    tokens per pass (fp32); sampled output follows the target's distribution exactly.

    Returns the token ids `(B, length)`, or a `DSparkGenerateOutput` with `return_dict_in_generate=True`.

    Raises:
        ValueError: before any work, if the request cannot be served exactly; the message says why.
    """
    check_request(
        model, input_ids, generation_config, model_kwargs, num_drafts=drafter.block_size, synced_gpus=synced_gpus
    )
    options = read_options(
        generation_config, drafter, model, scheduler, drafts, model_kwargs[CACHE_KEY], sampling, draft_tree
    )
    adapter = TargetAdapter(model, options.target_layer_ids(drafter))
    drafter.check_target(adapter)
    with adapter:
        rows = CallRows(
            input_ids,
            generation_config,
            logits_processor,
            stopping_criteria,
            streamer,
            num_drafts=options.num_drafts,
            num_looked_up=options.num_looked_up,
            returns_cache=was_given_by_user(model_kwargs[CACHE_KEY]),
            has_fixed_size=is_static(model_kwargs[CACHE_KEY]) or bool(row_adapter_options(model)),
            is_invariant=options.is_invariant,
            has_streams_first=adapter.has_streams_first,
        )
        # there from the start, so that a streamer can ask where a token came from
        drafter.last_statistics = rows.statistics
        rows.statistics.scheduler = options.scheduler.name
        widest = options.most_drafts + 1
        target = choose_target(adapter, input_ids, generation_config, model_kwargs, widest=widest)
        # compiled passes have products of their own, and the shortest texts are over before packing has paid
        is_short = (generation_config.max_length or math.inf) - input_ids.shape[1] <= FEW_TOKENS
        is_compiled = _is_compiled(target)
        models = () if is_short or is_compiled else (adapter.model, drafter)
        # a text of a word or two is over before packing has paid; but a call that measures passes, or is to repeat a
        # text, must not begin with other ones
        packs_later = pack_weights(*models, may_wait=options.scheduler.learns_costs)
        with packed_weights(*models), nullcontext() if is_compiled else lean_passes():
            context = options.start_context(drafter, adapter, len(input_ids))
            if _is_compiled(target):
                context.fix_size(target.size)
            num_branching = options.num_branching
            if num_branching != 0 and not _may_branch(target, context, rows, len(input_ids)):
                num_branching = 0
            call = replace(rows.describe(adapter, drafter), may_branch=num_branching is None)
            schedule = options.scheduler.start(call)
            lookups = None
            if options.num_looked_up:
                prompts = prompt_tokens(input_ids, model_kwargs.get("attention_mask"))
                lookups = Lookups(prompts, schedule.match_chances, min_match=drafter.min_match)
            rounds = Rounds(adapter, target, context, schedule, rows, rows.statistics, lookups, num_branching)
            try:
                rounds.prefill()
                if packs_later and not rows.are_done:
                    # wide passes are dear until then
                    rounds.round(is_packed=False)
                    pack_weights(*(() if rows.are_done else models))
                while not rows.are_done:
                    rounds.round()
                drafter.review(adapter, rows.statistics)
                return rows.finish(target)
            finally:
                # a round that a user's code or Ctrl-C ended leaves no drafts in the user's cache
                target.release()


class Rounds:
    """Decode rows round by round.

    Args:
        adapter: the target, entered by the caller.
        target: the target over its cache.
        context: the drafter's context.
        schedule: how many drafts are made and verified.
        rows: the rows, and the rules by which they are written.
        statistics: where passes and their time are counted.
        lookups: the rows' texts, if drafts may be looked up in them.
        num_branching: drafts of a tree that the drafter makes instead of a chain; 0 for none, None for as many as the
            schedule says. Only for one row, where drafter, target and rows have to do with trees.
    """

    def __init__(
        self,
        adapter: TargetAdapter,
        target: TargetState,
        context: DraftContext,
        schedule: Schedule,
        rows: Rows,
        statistics: SpeculationStatistics,
        lookups: Lookups | None = None,
        num_branching: int | None = 0,
    ):
        self._adapter = adapter
        self._target = target
        self._context = DeferredContext(context)
        self._schedule = schedule
        self._rows = rows
        self._statistics = statistics
        self._lookups = lookups
        self._num_branching = num_branching
        # how much of each row the target's cache holds
        self._num_processed: list[int] = []

    def prefill(self) -> None:
        """Process the prompts and commit every row's first token."""
        rows = self._rows
        with self._statistics.timed("prefill_seconds", self._adapter.device):
            target_pass = self._target.prefill()
        self._statistics.settle()
        self._statistics.num_target_passes += 1
        last = torch.tensor(target_pass.num_tokens, device=target_pass.positions.device) - 1
        self._num_processed = (target_pass.positions.gather(1, last[:, None])[:, 0] + 1).tolist()
        self._context.extend(target_pass.context_hidden_states, target_pass.positions, target_pass.num_tokens)
        nothing = [0] * len(target_pass.num_tokens)
        scores, _, first = self._accept(target_pass, target_pass.positions[:, :0], None, nothing)
        _, choices = _accepted_tokens(first[:, None], nothing, first)
        self._look_back(choices, rows.commit(target_pass, scores, choices, None))
        self.drop_rows()

    def round(self, *, is_packed: bool = True) -> None:
        """Draft, schedule, verify, commit and roll back once; before packing a plain step that teaches nothing."""
        rows, batch = self._rows, self._batch()
        with self._recorded(batch, teaches=is_packed) as record:
            anchors, drafted = rows.anchors(), None
            if is_packed:
                draft = partial(self._draft, anchors, batch)
                drafted = propose(self._schedule, self._lookups, batch, draft, record, anchors.device)
            tokens = _verified_tokens(anchors, drafted, max(record.num_verified))
            parents = _parents(drafted, tokens)
            target_pass = self._verify(tokens, parents)
            path: Sequence[int] = range(tokens.shape[1])
            if parents is None:
                scores, num_accepted, bonus = self._accept(target_pass, tokens[:, 1:], drafted, record.num_verified)
            else:
                path, scores, bonus = _walk(rows, target_pass, tokens, parents, record)
                target_pass, tokens, num_accepted = target_pass.along(path), tokens[:, path], [len(path) - 1]
            record.num_accepted, new_tokens = _accepted_tokens(tokens, num_accepted, bonus)
            num_kept = rows.commit(target_pass, scores, new_tokens, record)
            self._keep(target_pass, path, num_kept)
            self._look_back(new_tokens, num_kept)
            self.drop_rows()

    def drop_rows(self) -> None:
        """Take rows that are over out of the batch and the caches."""
        staying = self._rows.leave()
        if staying:
            index = torch.tensor(staying, device=self._adapter.device)
            self._target.select_rows(index)
            self._context.select_rows(index)
            if self._lookups is not None:
                self._lookups.select_rows(staying)
            self._num_processed = [self._num_processed[i] for i in staying]

    def append(self, other: Rounds) -> None:
        """Take over the rows of other rounds of the same target and drafter, which end there."""
        self._num_processed = self._num_processed + other._num_processed
        self._target.append_rows(other._target)
        self._context.append_rows(other._context)
        if self._lookups is not None and other._lookups is not None:
            self._lookups.append_rows(other._lookups)

    def _batch(self) -> Batch:
        """Return what a schedule is told of the rows; no draft stands at a position that the target does not know."""
        batch = self._rows.batch()
        last = getattr(self._adapter.config, "max_position_embeddings", None)
        if last is None:
            return batch
        room = [last - 1 - length for length in self._num_processed]
        return replace(batch, limits=_cut(batch.limits, room), rooms=_cut(batch.rooms, room) if batch.rooms else ())

    def _draft(self, anchors: Tensor, batch: Batch, num_drafts: int) -> DraftedBlock | None:
        """Return the drafts of all rows, or None for a round without."""
        if num_drafts < 1:
            return None
        positions = torch.tensor(self._num_processed, device=anchors.device)
        num_branching = self._schedule.num_branching(batch) if self._num_branching is None else self._num_branching
        if num_branching:
            with self._statistics.timed("draft_seconds", self._adapter.device):
                return self._context.draft_tree(anchors, positions, batch.max_drafts, num_branching)
        sampler = SlotSampler(self._rows, wants_margins=self._schedule.wants_margins)
        with self._statistics.timed("draft_seconds", self._adapter.device):
            drafted = self._context.draft(anchors, positions, num_drafts, sampler)
        if drafted.parents is not None:
            raise ValueError(
                "`parents` of a drafted block must be None where a chain was asked for, got a tree. Return trees from "
                "`draft_tree` alone."
            )
        margins = sampler.margins()
        return drafted if margins is None else replace(drafted, margins=margins)

    def _verify(self, tokens: Tensor, parents: Tensor | None) -> TargetPass:
        """Return the target's pass over `tokens` `(b, W)`, which continue each other as `parents` say."""
        with self._statistics.timed("verify_seconds", self._adapter.device):
            target_pass = self._target.verify(tokens.to(self._adapter.device), parents)
        self._statistics.num_target_passes += 1
        return target_pass

    def _accept(
        self, target_pass: TargetPass, drafts: Tensor, drafted: DraftedBlock | None, num_verified: list[int]
    ) -> tuple[Tensor, Tensor | list[int], Tensor]:
        """Return the pass's scores `(b, W, V)`, how many drafts each row accepts, and its bonus token `(b,)`."""
        if self._rows.accept_in_steps:
            return accept_in_steps(self._rows, target_pass, drafts, drafted, num_verified)
        scores = self._rows.scores(target_pass, drafts)
        num_drafts = scores.shape[1] - 1
        noisy = self._rows.with_noise(scores, 0)
        if drafted is None or num_drafts == 0:
            return scores, [0] * len(num_verified), draw_or_best(noisy[:, 0], self._rows.probabilities(noisy[:, 0]))
        limits = _sent(num_verified, scores.device)
        draft_ids = drafted.token_ids[:, :num_drafts].to(scores.device)
        target_probs = self._rows.probabilities(noisy)
        if target_probs is None:
            num_accepted, bonus = verify_greedy(draft_ids, most_likely(noisy), limits)
        else:
            draft_probs, is_certain = (
                None if values is None else values[:, :num_drafts].to(scores.device)
                for values in (drafted.probs, drafted.is_certain)
            )
            num_accepted, bonus = verify(draft_ids, draft_probs, target_probs, limits, is_certain)
        return scores, num_accepted, bonus

    def _keep(self, target_pass: TargetPass, path: Sequence[int], num_kept: list[int]) -> None:
        """Roll the target back to the kept tokens of `path`, and let the drafter read their hidden states."""
        self._num_processed = [old + new for old, new in zip(self._num_processed, num_kept, strict=True)]
        self._target.keep([path[:count] for count in num_kept])
        self._context.extend(target_pass.context_hidden_states, target_pass.positions, num_kept)

    def _look_back(self, new_tokens: NewTokens, num_kept: list[int]) -> None:
        """Let the rows' texts grow by their kept tokens."""
        if self._lookups is not None:
            self._lookups.read([ids[:count] for ids, count in zip(new_tokens.ids, num_kept, strict=True)])

    @contextmanager
    def _recorded(self, batch: Batch, *, teaches: bool) -> Iterator[RoundInProgress]:
        """Give the record of a round; once the round is over, count its time and, if it `teaches`, let the schedule
        learn from it."""
        statistics, record = self._statistics, RoundInProgress(num_verified=[0] * batch.num_rows)
        start, drafting, verifying = perf_counter(), statistics.draft_seconds, statistics.verify_seconds
        is_typical = not self._context.is_behind
        yield record
        # behind the round's transfer there is nothing to wait for
        statistics.settle()
        seconds, drafting = perf_counter() - start, statistics.draft_seconds - drafting
        statistics.other_seconds += seconds - drafting - (statistics.verify_seconds - verifying)
        statistics.count_parking(self._schedule.parked_because, record.num_drafted)
        if not teaches:
            return
        outcome = outcome_of(batch, record, drafting, seconds - drafting, is_typical=is_typical)
        learn = self._schedule.observe if record.places is None else self._schedule.observe_tree
        learn(outcome)
        if self._lookups is not None:
            self._schedule.compare(outcome)


def _is_compiled(target: TargetState) -> TypeGuard[StaticTarget]:
    return isinstance(target, StaticTarget) and target.size.compile_options is not None


def _may_branch(target: TargetState, context: DraftContext, rows: Rows, num_rows: int) -> bool:
    """Return whether drafts of one row may form a tree; a processor that remembers its calls is shown chains."""
    return num_rows == 1 and context.drafts_trees and not rows.accept_in_steps and target.takes_trees


def _cut(limits: tuple[int, ...], room: list[int]) -> tuple[int, ...]:
    # a text that is longer already goes on as it does without drafts
    return tuple(limit if left < 0 else min(limit, left) for limit, left in zip(limits, room, strict=True))


def _parents(drafted: DraftedBlock | None, tokens: Tensor) -> Tensor | None:
    """Return which of the verified `tokens` `(1, W)` each one continues, `(W,)`, or None where they are a chain."""
    return None if drafted is None or drafted.parents is None else drafted.parents[: tokens.shape[1]]


def _walk(
    rows: Rows, target_pass: TargetPass, tokens: Tensor, parents: Tensor, record: RoundInProgress
) -> tuple[list[int], Tensor, Tensor]:
    """Return the accepted path in a tree, its scores `(1, n, V)` and the bonus token `(1,)`, and record the path."""
    found = walk(rows, target_pass, tokens, parents)
    record.num_tried, record.places = found.num_tried, tuple(place - 1 for place in found.path[1:])
    return found.path, found.scores, found.bonus


def _verified_tokens(anchors: Tensor, drafted: DraftedBlock | None, num_drafts: int) -> Tensor:
    """Return every row's anchor and the drafts that are verified, `(b, 1 + num_drafts)`."""
    if drafted is None or num_drafts == 0:
        return anchors[:, None]
    return torch.cat([anchors[:, None], drafted.token_ids[:, :num_drafts].to(anchors.device)], dim=1)


def _sent(values: list[int], device: torch.device) -> Tensor:
    """Return the values on a device whose queue is not waited for."""
    tensor = torch.tensor(values, device="cpu")
    # a copy from ordinary memory is over only when all that was queued before it is
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _accepted_tokens(tokens: Tensor, num_accepted: Tensor | list[int], bonus: Tensor) -> tuple[list[int], NewTokens]:
    """Return how many drafts each row accepts of the verified `tokens` `(b, W)`, and these with its bonus token."""
    counts = torch.as_tensor(num_accepted, device=bonus.device)[:, None]
    places = torch.arange(tokens.shape[1], device=bonus.device)
    drafts = nn.functional.pad(tokens.to(bonus.device)[:, 1:], (0, 1))
    new_tokens = torch.where(places < counts, drafts, bonus[:, None])
    # the one moment of a round in which the host waits for the device
    known: list[list[int]] = torch.cat([counts, new_tokens], dim=1).tolist()
    ids = [row[1 : row[0] + 2] for row in known]
    return [row[0] for row in known], NewTokens(ids, [new_tokens[i, : len(row)] for i, row in enumerate(ids)])
