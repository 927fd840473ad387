"""Rotary embeddings whose frequencies depend on how far a pass reaches: drafts that reach further change the text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from dspark_hf.generation.compat import CACHE_KEY


def check_rotary(
    config: PreTrainedConfig,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    num_drafts: int,
    shares_passes: bool,
) -> None:
    """Raise a `ValueError` if drafts, or other requests' rows, may change the frequencies of the embedding.

    Args:
        config: the target's text configuration.
        input_ids: the prompts `(B, P)`.
        generation_config: the prepared generation configuration.
        model_kwargs: what `generate` prepared for the forward pass.
        num_drafts: drafts per round at most.
        shares_passes: whether rows that come and go run in the same passes.
    """
    for kind, limit in _switches(config):
        first, last = _reach(input_ids, generation_config, model_kwargs)
        # LongRoPE has one set of frequencies for all passes beyond, the dynamic one a set for each
        stays_beyond = kind == "longrope" and first > limit and not shares_passes
        if last + num_drafts > limit and not stays_beyond:
            raise ValueError(
                f"`max_new_tokens` must keep text and drafts within {limit} tokens when a drafter assists, since the "
                f"rotary embedding of type {kind!r} goes by the longest text of a pass, got up to {last} and "
                f"{num_drafts} drafts. Ask for fewer tokens, or generate without `assistant_model`."
            )


def has_switch(config: PreTrainedConfig) -> bool:
    """Return whether the embedding changes once a pass reaches beyond some length."""
    return any(True for _ in _switches(config))


def _switches(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """Give the types of embeddings that change, and the length up to which they do not."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # some have a set per kind of layer
    for one in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        kind = one.get("rope_type", one.get("type")) or ""
        # transformers 5.24: modeling_rope_utils.dynamic_rope_update
        if kind == "longrope":
            given = one.get("original_max_position_embeddings")
            given = given or getattr(config, "original_max_position_embeddings", None)
            yield kind, given or config.max_position_embeddings
        elif "dynamic" in kind:
            yield kind, config.max_position_embeddings


def _reach(
    input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
) -> tuple[float, float]:
    """Return how many tokens the shortest row's first pass reaches to, and the longest row's last one."""
    max_length, positions = generation_config.max_length, model_kwargs.get("position_ids")
    past_length = int(model_kwargs[CACHE_KEY].get_seq_length())
    if max_length is None or positions is None:
        return 0, math.inf
    first = int(positions[..., -1].min()) + 1
    # Phi-3 computes a cache anew that ends before the switch
    return min(first, past_length or first), int(positions.max()) + 1 + max_length - input_ids.shape[1]
