"""Steps of a target and a drafter at a given size, run for the time they take.

B rows, W tokens of a pass, K drafts, M tapped layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from dspark_hf.generation.compat import CACHE_KEY, empty_cache_like, is_placeholder_layer, is_stateful
from dspark_hf.generation.drafting.interface import DraftContext, Drafter
from dspark_hf.generation.scheduling.costs.measuring import timed
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.cropped import SingleRowTarget
from dspark_hf.generation.targets.interface import RowwiseCache, TargetState
from dspark_hf.generation.targets.ragged import RaggedTarget
from dspark_hf.generation.targets.ragged_cache import PLAIN_LAYERS, RaggedCache

# tokens of a piece: a whole context's hidden states may need more memory than its caches
_PIECE = 1024
# neighbouring tokens shall lie far apart in the vocabulary
_STRIDE = 7919


class Workload:
    """Run passes and drafts of any size, through the very code that `generate` runs.

    One row runs as an unpadded prompt does, several as a padded batch does. Where the cache allows it, contexts are
    not computed but made up: what a step costs depends on their length alone.

    Args:
        adapter: the target, entered by the caller, with at least one tapped layer.
        drafter: the drafter, or None to run passes of the target only.
    """

    def __init__(self, adapter: TargetAdapter, drafter: Drafter | None):
        self._adapter = adapter
        self._drafter = drafter
        self._device: torch.device = adapter.model.device
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
        # the result is fetched, as in a round: that waits for all devices
        seconds = timed(lambda: target.verify(token_ids).logits.argmax(-1).tolist(), self._wait)
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
            # read and dropped: the context keeps its length
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
        # the model's own kind of cache, with one token in it
        cache = model(input_ids=tokens, use_cache=True)[CACHE_KEY]
        self._adapter.pop_context_hidden_states()
        if is_stateful(model) or not cache.is_croppable:
            raise ValueError(
                f"`target` must have a cache that can be rolled back, got {type(model).__name__}. No drafter "
                "can assist it; for DeepSeek-V4 load a `DeepseekV4DSparkForCausalLM`."
            )
        if isinstance(cache, RowwiseCache):
            return self._rowwise_target(cache, num_rows, context_length)
        if num_rows == 1:
            return self._single_row_target(cache, context_length)
        target = RaggedTarget(
            self._adapter, tokens, GenerationConfig(), {CACHE_KEY: empty_cache_like(model)}, widest=1
        )
        assert isinstance(target.cache, RaggedCache)
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
        def make(length: int) -> SingleRowTarget:
            return SingleRowTarget(self._adapter, self._tokens(1, length), GenerationConfig(), {CACHE_KEY: cache})

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
            # one size at a time: caches of long contexts are large
            self._shape, self._target, self._context = (num_rows, context_length), None, None

    def _tokens(self, num_rows: int, width: int) -> Tensor:
        # all different, so that a mixture sends them to different experts; special ones lie at the vocabulary's ends
        count = max(self._adapter.vocab_size // 2, 1)
        numbers = 1 + torch.arange(num_rows * width, device=self._device)
        return (numbers * _STRIDE % count).view(num_rows, width)

    def _hidden_states(self, num_rows: int, width: int) -> Tensor:
        assert self._drafter is not None
        size = self._adapter.hidden_size * len(self._drafter.target_layer_ids)
        # different for every token, as above; without a draw from the generator that sampling uses
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
    return logits.argmax(-1), None
