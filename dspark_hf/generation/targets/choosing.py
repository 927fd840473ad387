"""Which way of rolling back fits a call."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from dspark_hf.generation.compat import CACHE_KEY, is_static
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.cropped import SingleRowTarget
from dspark_hf.generation.targets.interface import RowwiseCache, TargetState
from dspark_hf.generation.targets.ragged import RaggedTarget
from dspark_hf.generation.targets.recurrent_row import RecurrentTarget
from dspark_hf.generation.targets.recurrent_support import can_recompute
from dspark_hf.generation.targets.static import StaticTarget


def choose_target(
    adapter: TargetAdapter,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    widest: int,
) -> TargetState:
    """Return the target over its cache: one unpadded row is cropped in the user's own cache, others are ragged.

    Those of a static cache are ragged in one of the same size.

    Args:
        adapter: the target, entered by the caller.
        input_ids: the prompts `(B, P)`.
        generation_config: the prepared generation configuration.
        model_kwargs: what `generate` prepared for the forward pass.
        widest: tokens a row that a verify pass may have to take back.

    Raises:
        ValueError: if the target, its cache or an input cannot be handled row by row.
    """
    if is_static(model_kwargs[CACHE_KEY]):
        return StaticTarget(adapter, input_ids, generation_config, model_kwargs, widest=widest)
    mask = model_kwargs.get("attention_mask")
    has_rows = isinstance(model_kwargs[CACHE_KEY], RowwiseCache)
    if len(input_ids) == 1 and not has_rows and (mask is None or bool(mask.all())):
        kind = RecurrentTarget if can_recompute(adapter.model) else SingleRowTarget
        return kind(adapter, input_ids, generation_config, model_kwargs)
    return RaggedTarget(adapter, input_ids, generation_config, model_kwargs, widest=widest)
