"""Steps of a target and a drafter at a given size, run for the time they take.

B rows, W tokens of a pass, K drafts, M tapped layers, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig

from dspark_hf.generation.drafting import DraftContext, Drafter
from dspark_hf.generation.integration import CACHE_KEY, empty_cache_like
from dspark_hf.generation.passes import TargetState
from dspark_hf.generation.ragged import RaggedTarget
from dspark_hf.generation.rowwise import RowwiseCache, RowwiseTarget
from dspark_hf.generation.single_row import SingleRowTarget
from dspark_hf.generation.target import TargetAdapter
from dspark_hf.profiling.measuring import timed

# any token will do; most vocabularies have this one
_TOKEN = 1


class Workload:
    """Run passes and drafts of any size, through the very code that `generate` runs.

    Contexts are made of zeros: what a step costs depends on their length alone.

    Args:
        adapter: the target, entered by the caller.
        drafter: the drafter.
    """

    def __init__(self, adapter: TargetAdapter, drafter: Drafter):
        self._adapter = adapter
        self._drafter = drafter
        self._device: torch.device = adapter.model.device
        self._shape: tuple[int, int] = (0, 0)
        self._target: TargetState | None = None
        self._context: DraftContext | None = None

    @torch.no_grad()
    def verify_seconds(self, num_rows: int, context_length: int, width: int) -> float:
        """Return the seconds of one pass over `width` tokens of each row."""
        target = self._target_at(num_rows, context_length)
        token_ids = self._tokens(num_rows, width)

        def run() -> None:
            target.verify(token_ids).logits.argmax(-1)

        seconds = timed(run, self._wait)
        target.keep([0] * num_rows)
        return seconds

    @torch.no_grad()
    def draft_seconds(self, num_rows: int, context_length: int, num_drafts: int) -> float:
        """Return the seconds of reading one round's hidden states and drafting."""
        context = self._context_at(num_rows, context_length)
        states = self._hidden_states(num_rows, num_drafts + 1)
        anchors = self._tokens(num_rows, 1)[:, 0]
        starts = torch.full((num_rows,), context_length, device=self._device)
        positions = starts[:, None] + torch.arange(num_drafts + 1, device=self._device)

        def run() -> None:
            # half of the drafts, as a guess of what is accepted: the context hardly grows meanwhile
            context.extend(states, positions, [1 + num_drafts // 2] * num_rows)
            context.draft(anchors, starts, num_drafts, _choose_best)

        return timed(run, self._wait)

    def _target_at(self, num_rows: int, context_length: int) -> TargetState:
        if self._shape != (num_rows, context_length) or self._target is None:
            self._reset(num_rows, context_length)
            try:
                self._target = self._ragged_target(num_rows, context_length)
            except ValueError:
                # a target that does not run on the ragged cache
                self._target = self._other_target(num_rows, context_length)
        return self._target

    def _ragged_target(self, num_rows: int, context_length: int) -> TargetState:
        kwargs = {CACHE_KEY: empty_cache_like(self._adapter.model)}
        target = RaggedTarget(self._adapter, self._tokens(num_rows, 1), GenerationConfig(), kwargs)
        target.prefill()
        target.cache.pretend_length(context_length)
        return target

    def _other_target(self, num_rows: int, context_length: int) -> TargetState:
        token_ids = self._tokens(num_rows, context_length)
        cache = self._adapter.model(input_ids=token_ids, use_cache=True)[CACHE_KEY]
        if isinstance(cache, RowwiseCache):
            return RowwiseTarget(self._adapter, token_ids, GenerationConfig(), {CACHE_KEY: cache}, cache.max_rollback)
        target = SingleRowTarget(
            self._adapter, token_ids, GenerationConfig(), {CACHE_KEY: empty_cache_like(self._adapter.model)}
        )
        target.prefill()
        return target

    def _context_at(self, num_rows: int, context_length: int) -> DraftContext:
        if self._shape != (num_rows, context_length) or self._context is None:
            self._reset(num_rows, context_length)
            self._context = self._drafter.start(self._adapter, num_rows)
            positions = torch.arange(context_length, device=self._device).expand(num_rows, -1)
            states = self._hidden_states(num_rows, context_length)
            self._context.extend(states, positions, [context_length] * num_rows)
        return self._context

    def _reset(self, num_rows: int, context_length: int) -> None:
        if self._shape != (num_rows, context_length):
            # one size at a time: caches of long contexts are large
            self._shape, self._target, self._context = (num_rows, context_length), None, None

    def _tokens(self, num_rows: int, width: int) -> Tensor:
        return torch.full((num_rows, width), _TOKEN, device=self._device)

    def _hidden_states(self, num_rows: int, width: int) -> Tensor:
        size = self._adapter.hidden_size * len(self._drafter.target_layer_ids)
        return torch.zeros(num_rows, width, size, device=self._device, dtype=self._adapter.model.dtype)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _choose_best(slot: int, logits: Tensor, drafted: Tensor) -> tuple[Tensor, None]:
    return logits.argmax(-1), None
