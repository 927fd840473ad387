"""One row of a target with recurrent layers, with the cache that `generate` prepared or that the user brought."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from dspark_hf.generation.compat import CACHE_KEY, mask_length, stop_recording
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.cropped import SingleRowTarget
from dspark_hf.generation.targets.interface import TargetPass
from dspark_hf.generation.targets.recurrent import RecurrentStates, cached_length, is_recurrent_layer
from dspark_hf.generation.targets.trees import check_kept


class RecurrentTarget(SingleRowTarget):
    """Run the target on one unpadded row: keys and values are cropped, states run again over the kept tokens."""

    def __init__(
        self,
        adapter: TargetAdapter,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        self._states = RecurrentStates(model_kwargs[CACHE_KEY].layers)
        self._are_drafts = False
        super().__init__(adapter, input_ids, generation_config, model_kwargs)

    def _held(self) -> int:
        width = mask_length(self._generation_config, self._kwargs.get("attention_mask"))
        return cached_length(self._cache, self._ids.shape[1], width)

    def verify(self, token_ids: Tensor, parents: Tensor | None = None) -> TargetPass:
        """Process anchor and drafts `(1, W)`; `parents` `(W,)`, if given, must describe a chain."""
        self._are_drafts = True
        return super().verify(token_ids, parents)

    def _run(self, inputs: dict[str, Any], num_tokens: int, width: int, past_length: int) -> TargetPass:
        with self._states.watched(num_tokens, are_drafts=self._are_drafts):
            return super()._run(inputs, num_tokens, width, past_length)

    def _check_filled(self, length: int) -> None:
        # states alone do not know how much they hold
        if any(isinstance(layer, CacheLayerMixin) for layer in self._cache.layers):
            super()._check_filled(length)

    def _finish_prefill(self) -> None:
        self._states.keep([0])
        self._trim()

    def _trim(self) -> None:
        crop_attention(self._cache.layers, 0)

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Crop keys and values behind the kept tokens, and let states and windows end there."""
        check_kept(kept, self._width)
        count = len(kept[0])
        self._states.keep([count])
        self._length += count
        crop_attention(self._cache.layers, self._width - count)
        self._width = 0

    def release(self) -> None:
        """Take back what an interrupted round left in the cache, and let it forget on update again."""
        self._states.restore()
        for layer in self._cache.layers:
            if isinstance(layer, CacheLayerMixin):
                surplus = layer.get_seq_length() - self._length
                if surplus > 0:
                    crop_attention([layer], surplus)
        stop_recording(self._cache)


def crop_attention(layers: Sequence[Any], num_tokens: int) -> None:
    """Remove the last `num_tokens` keys and values; layers that have states beside them crop both by themselves."""
    for layer in layers:
        if not is_recurrent_layer(layer):
            layer.crop(-num_tokens)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            DynamicSlidingWindowLayer.crop(layer, -num_tokens)
        elif isinstance(layer, DynamicLayer):
            DynamicLayer.crop(layer, -num_tokens)
