"""Time single steps of a target and a drafter at a given size.

B rows, W tokens of a pass, K drafts, M tapped layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from dspark_hf.generation.compat import CACHE_KEY, empty_cache_like, is_placeholder_layer
from dspark_hf.generation.drafting.interface import DraftContext, Drafter
from dspark_hf.generation.drawing import most_likely
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.aligned_cache import AlignedCache
from dspark_hf.generation.targets.cropped import SingleRowTarget
from dspark_hf.generation.targets.interface import RowwiseCache, TargetState
from dspark_hf.generation.targets.ragged import RaggedTarget
from dspark_hf.generation.targets.ragged_cache import PLAIN_LAYERS, RaggedCache
from dspark_hf.generation.targets.recurrent_row import RecurrentTarget
from dspark_hf.generation.targets.recurrent_support import can_recompute
from dspark_hf.generation.targets.rollback import check_rollback

# tokens that are processed at once: the hidden states of a whole context may need more memory than its caches
_PIECE = 1024
# neighbouring tokens are to lie far apart in the vocabulary
_STRIDE = 7919

# series of turns at most, of which all but the first are for costs that look disturbed
_MOST_SERIES = 3
# an upper quartile this many times the lower one tells of other programs
_MOST_SPREAD = 1.5

_Step = TypeVar("_Step")


def measure(
    steps: Sequence[_Step],
    seconds_of: Callable[[_Step], float],
    *,
    repeats: int = 5,
    advance: Callable[[], None] = lambda: None,
    is_doubtful: Callable[[dict[_Step, list[float]]], bool] = lambda times: False,
) -> dict[_Step, float]:
    """Return every step's time, the lower quartile of all turns that count: disturbances only ever add.

    A first turn that is not counted lets kernels be chosen and memory be found.

    Args:
        steps: what to measure.
        seconds_of: runs a step and returns its seconds.
        repeats: turns that count.
        advance: called after every run of the first series, `(repeats + 1) * len(steps)` times.
        is_doubtful: told every step's latest times in ascending order; if true, another series of `repeats` turns
            follows, twice at most.
    """
    times: dict[_Step, list[float]] = {step: [] for step in steps}
    for series in range(_MOST_SERIES):
        latest: dict[_Step, list[float]] = {step: [] for step in steps}
        for turn in range(repeats + 1):
            # another step goes first each time
            first = turn * len(steps) // (repeats + 1)
            for step in [*steps[first:], *steps[:first]]:
                seconds = seconds_of(step)
                if turn:
                    latest[step].append(seconds)
                if not series:
                    advance()
        latest = {step: sorted(samples) for step, samples in latest.items()}
        times = {step: sorted(times[step] + samples) for step, samples in latest.items()}
        if not is_doubtful(latest):
            break
    return {step: lower_quartile(samples) for step, samples in times.items()}


def lower_quartile(samples: Sequence[float]) -> float:
    """Return the lower quartile of sorted samples."""
    return samples[(len(samples) - 1) // 4]


def disagree(samples: Sequence[float]) -> bool:
    """Return whether the quartiles of sorted samples lie further apart than a quiet machine's."""
    return samples[-1 - (len(samples) - 1) // 4] > _MOST_SPREAD * lower_quartile(samples)


def timed(run: Callable[[], object], wait: Callable[[], object]) -> float:
    """Return the seconds that `run` takes until `wait` has returned."""
    wait()
    start = perf_counter()
    run()
    wait()
    return perf_counter() - start


class StepTimer:
    """Time passes and drafts of any size, through the same code that `generate` runs.

    One row runs like an unpadded prompt, several run like a padded batch. Where the cache allows it, contexts are made
    up instead of computed: the cost of a step depends only on their length.

    Args:
        adapter: the target, entered by the caller, with at least one tapped layer.
        drafter: the drafter, or None to run passes of the target only.
    """

    def __init__(self, adapter: TargetAdapter, drafter: Drafter | None):
        self._adapter = adapter
        self._drafter = drafter
        self._device: torch.device = adapter.device
        self._shape: tuple[int, int] = (0, 0)
        self._target: TargetState | None = None
        self._context: DraftContext | None = None

    @property
    def draws_at_random(self) -> bool:
        """Whether some module is in training mode, where dropout draws."""
        wholes = [whole for whole in (self._adapter.model, self._drafter) if isinstance(whole, nn.Module)]
        return any(module.training for whole in wholes for module in whole.modules())

    @torch.no_grad()
    def verify_seconds(self, num_rows: int, context_length: int, width: int) -> float:
        """Return the seconds of one pass over `width` tokens of each row.

        Raises:
            ValueError: if the target cannot process that many rows, or take that many tokens back.
        """
        target = self._target_at(num_rows, context_length)
        token_ids = self._tokens(num_rows, width)
        # the result is fetched, as in a round, which waits for all devices
        seconds = timed(lambda: most_likely(target.verify(token_ids).logits).tolist(), self._wait)
        target.keep([range(0)] * num_rows)
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
            # zero tokens are kept, so the context keeps its length
            context.extend(states, positions, [0] * num_rows)
            context.draft(anchors, starts, num_drafts, _choose_best).token_ids.tolist()

        return timed(run, self._wait)

    def _target_at(self, num_rows: int, context_length: int) -> TargetState:
        self._reset(num_rows, context_length)
        if self._target is None:
            self._target = self._make_target(num_rows, context_length)
        return self._target

    def _make_target(self, num_rows: int, context_length: int) -> TargetState:
        model, tokens = self._adapter.model, self._tokens(num_rows, 1)
        check_rollback(model)
        # the model's own kind of cache, with one token in it
        cache = model(input_ids=tokens, use_cache=True)[CACHE_KEY]
        self._adapter.pop_context_hidden_states()
        has_states = can_recompute(model)
        if not (has_states or cache.is_croppable):
            raise ValueError(
                f"`target` must have a cache that can be rolled back, got {type(model).__name__}. No drafter "
                "can assist it."
            )
        if isinstance(cache, RowwiseCache):
            return self._rowwise_target(cache, num_rows, context_length)
        if num_rows == 1:
            return self._single_row_target(cache, context_length)
        target = RaggedTarget(
            self._adapter, tokens, GenerationConfig(), {CACHE_KEY: empty_cache_like(model)}, widest=1
        )
        assert isinstance(target.cache, RaggedCache | AlignedCache)
        if has_states or isinstance(target.cache, AlignedCache):
            # states of one token: what a pass costs does not depend on how many there were
            target.prefill()
        target.cache.pretend_length(context_length)
        return target

    def _rowwise_target(self, cache: Any, num_rows: int, context_length: int) -> TargetState:
        def make(length: int) -> RaggedTarget:
            tokens = self._tokens(num_rows, length)
            return RaggedTarget(self._adapter, tokens, GenerationConfig(), {CACHE_KEY: cache}, widest=1)

        for length in _pieces(context_length - 1, num_rows):
            make(length).prefill()
        return make(1)

    def _single_row_target(self, cache: Any, context_length: int) -> TargetState:
        kind = RecurrentTarget if can_recompute(self._adapter.model) else SingleRowTarget

        def make(length: int) -> SingleRowTarget:
            return kind(self._adapter, self._tokens(1, length), GenerationConfig(), {CACHE_KEY: cache})

        # as a prefill does
        cache.activate_past_recording()
        missing = context_length - 1
        layers = [layer for layer in cache.layers if not is_placeholder_layer(layer)]
        if not all(type(layer) in PLAIN_LAYERS for layer in layers):
            for length in _pieces(missing, 1):
                make(length).prefill()
            return make(1)
        for layer in layers if missing else ():
            layer.update(*(states.expand(-1, -1, missing, -1) for states in (layer.keys, layer.values)))
        cache.crop(0)
        return make(1)

    def _context_at(self, num_rows: int, context_length: int) -> DraftContext:
        self._reset(num_rows, context_length)
        if self._context is None:
            assert self._drafter is not None
            self._context = self._drafter.start(self._adapter, num_rows)
            start = 0
            for length in _pieces(context_length, num_rows):
                positions = torch.arange(start, start + length, device=self._device).expand(num_rows, -1)
                self._context.extend(self._hidden_states(num_rows, length), positions, [length] * num_rows)
                start += length
        return self._context

    def _reset(self, num_rows: int, context_length: int) -> None:
        if self._shape != (num_rows, context_length):
            # only one size is kept, since caches of long contexts are large
            self._shape, self._target, self._context = (num_rows, context_length), None, None

    def _tokens(self, num_rows: int, width: int) -> Tensor:
        # all different, so that a mixture of experts spreads them; the upper half of the vocabulary and token 0, where
        # special tokens usually lie, are left out
        count = max(self._adapter.vocab_size // 2, 1)
        numbers = 1 + torch.arange(num_rows * width, device=self._device)
        return (numbers * _STRIDE % count).view(num_rows, width)

    def _hidden_states(self, num_rows: int, width: int) -> Tensor:
        assert self._drafter is not None
        size = self._adapter.hidden_size * len(self._drafter.target_layer_ids)
        # different for every token, as above, without drawing from the generator that sampling uses
        waves = torch.arange(num_rows * width * size, device=self._device, dtype=torch.float32).sin()
        return waves.view(num_rows, width, size).to(self._adapter.model.dtype)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _pieces(length: int, num_rows: int) -> Iterator[int]:
    """Give the lengths of pieces that `length` tokens of each row are processed in."""
    longest = max(_PIECE // num_rows, 1)
    for start in range(0, length, longest):
        yield min(longest, length - start)


def _choose_best(slot: int, logits: Tensor, drafted: Tensor) -> tuple[Tensor, None]:
    return most_likely(logits), None
