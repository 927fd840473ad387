"""Checks of a call of `generate` before any work is done, and the run-time knobs it carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

from dspark_hf.generation.call.rotary import check_rotary
from dspark_hf.generation.compat import CACHE_KEY, explicit_knob, is_stateful, scheduler_of_call
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.scheduling.choosing import choose_scheduler
from dspark_hf.generation.scheduling.interface import Scheduler
from dspark_hf.generation.targets.recurrent_support import can_recompute, check_state


@dataclass(frozen=True)
class SpeculationOptions:
    """`num_drafts`: drafts per round at most; `scheduler`: how many are made, and how many of them verified."""

    num_drafts: int
    scheduler: Scheduler


def read_options(
    generation_config: GenerationConfig, drafter: Drafter, model: PreTrainedModel, scheduler: Scheduler | str | None
) -> SpeculationOptions:
    """Return the run-time knobs; `scheduler` is what `custom_generate` was called with.

    Raises:
        ValueError: if more drafts are asked for than the drafter was trained to propose, or the threshold is no
            probability, or the scheduler does not exist or contradicts the threshold.
        TypeError: if the scheduler is neither a name nor a `Scheduler`.
    """
    num_drafts = explicit_knob(generation_config, "num_assistant_tokens")
    if num_drafts is not None and not 1 <= num_drafts <= drafter.block_size:
        raise ValueError(
            f"`num_assistant_tokens` must lie in [1, {drafter.block_size}] for this drafter (its block_size), got "
            f"{num_drafts}. Slots beyond the trained block are noise: lower it, or leave it out."
        )
    threshold = explicit_knob(generation_config, "assistant_confidence_threshold")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(
            f"`assistant_confidence_threshold` must lie in [0, 1], got {threshold}. It is compared with a probability."
        )
    chosen = scheduler if scheduler is not None else scheduler_of_call(generation_config)
    if chosen is None and threshold is None:
        chosen = drafter.scheduler
    is_tensor_parallel = (getattr(model, "tp_size", None) or 1) > 1
    return SpeculationOptions(
        num_drafts or drafter.block_size,
        choose_scheduler(chosen, threshold, is_tensor_parallel=is_tensor_parallel),
    )


def check_request(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    num_drafts: int,
    synced_gpus: bool = False,
    shares_passes: bool = False,
) -> None:
    """Raise a `ValueError` that names the obstacle if speculation cannot run exactly.

    `num_drafts` are made per round at most; `shares_passes` says whether other requests run in the same passes.
    """
    if model.config.is_encoder_decoder:
        _refuse("`assistant_model`", "assist a decoder-only target", f"the encoder-decoder {type(model).__name__}")
    if is_stateful(model):
        check_state(model)
    if (generation_config.num_beams or 1) > 1:
        _refuse("`num_beams`", "be 1 when a drafter assists", generation_config.num_beams, "Use greedy or sampling.")
    if getattr(generation_config, "assistant_ensemble_weight", None) is not None:
        weight = generation_config.assistant_ensemble_weight
        _refuse("`assistant_ensemble_weight`", "be None: it would change the output", weight, "Leave it out.")
    if synced_gpus:
        _refuse("`synced_gpus`", "be False when a drafter assists", synced_gpus, "Use `device_map` to span GPUs.")
    if model_kwargs.get("use_cache") and model_kwargs.get(CACHE_KEY) is None:
        # generate prepares none for MiniMax and its kin
        remedy = "It keeps one in a form of its own: generate without `assistant_model`."
        _refuse("`assistant_model`", "assist a target whose cache can be rolled back", type(model).__name__, remedy)
    check_cache(model_kwargs.get(CACHE_KEY), has_states=can_recompute(model))
    check_rotary(
        model.config.get_text_config(decoder=True),
        input_ids,
        generation_config,
        model_kwargs,
        num_drafts=num_drafts,
        shares_passes=shares_passes,
    )


def check_cache(cache: Any, *, has_states: bool = False) -> None:
    """Raise a `ValueError` unless `cache` is one that a rollback leaves no trace in.

    With `has_states`, those of recurrent layers are taken back by other means than a crop.
    """
    if not isinstance(cache, Cache):
        given = None if cache is None else type(cache).__name__
        _refuse(
            # MPT's configuration turns it off
            "`use_cache`",
            "be True when a drafter assists, with a Transformers cache",
            given,
            "Pass `use_cache=True`.",
        )
    if not isinstance(cache, DynamicCache) or not (has_states or cache.is_croppable):
        _refuse(
            "`cache_implementation`",
            "be a dynamic cache that can be rolled back when a drafter assists",
            type(cache).__name__,
            "Leave out `cache_implementation`, or generate without `assistant_model`.",
        )


def _refuse(name: str, rule: str, value: Any, remedy: str = "Generate without `assistant_model`.") -> None:
    raise ValueError(f"{name} must {rule}, got {value!r}. {remedy}")
