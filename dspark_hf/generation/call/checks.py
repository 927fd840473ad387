"""Checks of a call of `generate` before any work is done, and the run-time knobs it carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

from dspark_hf.generation.call.rotary import check_rotary, has_switch
from dspark_hf.generation.compat import CACHE_KEY, drafts_of_call, explicit_knob, is_stateful, scheduler_of_call
from dspark_hf.generation.drafting.interface import DraftContext, Drafter
from dspark_hf.generation.drafting.lookup import NoContext
from dspark_hf.generation.scheduling.choosing import choose_scheduler
from dspark_hf.generation.scheduling.interface import Scheduler
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.interface import RowwiseCache


@dataclass(frozen=True)
class SpeculationOptions:
    """How a call speculates.

    `num_drafts`: the drafter's drafts per round at most, 0 if it is not asked; `num_looked_up`: drafts that a row may
    look up instead, 0 if none; `scheduler`: how many are made, and how many of them verified; `drafts`: who makes
    them.
    """

    num_drafts: int
    num_looked_up: int
    scheduler: Scheduler
    drafts: str

    @property
    def most_drafts(self) -> int:
        """Drafts of a row and round at most, whoever makes them."""
        return max(self.num_drafts, self.num_looked_up)

    def target_layer_ids(self, drafter: Drafter) -> list[int]:
        """Return the layers whose outputs are read."""
        return drafter.target_layer_ids if self.num_drafts else []

    def start_context(self, drafter: Drafter, adapter: TargetAdapter, batch_size: int) -> DraftContext:
        """Return an empty context for `batch_size` sequences."""
        return drafter.start(adapter, batch_size) if self.num_drafts else NoContext()


def read_options(
    generation_config: GenerationConfig,
    drafter: Drafter,
    model: PreTrainedModel,
    scheduler: Scheduler | str | None,
    drafts: str | None = None,
    cache: Any = None,
) -> SpeculationOptions:
    """Return the run-time knobs; `scheduler` and `drafts` are what `custom_generate` was called with.

    Lookups are no longer than the `cache` can take back, if it is given.

    Raises:
        ValueError: if more drafts are asked for than the drafter was trained to propose, or of a source that there is
            not, or the threshold is no probability, or the scheduler does not exist or contradicts the threshold.
        TypeError: if the scheduler is neither a name nor a `Scheduler`.
    """
    num_drafts = explicit_knob(generation_config, "num_assistant_tokens")
    if num_drafts is not None and drafter.block_size and not 1 <= num_drafts <= drafter.block_size:
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
    source = _read_source(generation_config, drafter, drafts)
    return SpeculationOptions(
        0 if source == "lookup" else num_drafts or drafter.block_size,
        0 if source == "model" else min(num_drafts or drafter.longest_lookup, _longest_lookup(drafter, model, cache)),
        choose_scheduler(chosen, threshold, is_tensor_parallel=is_tensor_parallel),
        source,
    )


def _read_source(generation_config: GenerationConfig, drafter: Drafter, drafts: str | None) -> str:
    given = drafts if drafts is not None else drafts_of_call(generation_config)
    source: str = drafter.drafts if given is None else given
    if source not in drafter.sources:
        raise ValueError(
            f"`drafts` must be one of {', '.join(drafter.sources)} for {type(drafter).__name__}, got {source!r}. "
            "Correct it, or leave it out."
        )
    return source


def _longest_lookup(drafter: Drafter, model: PreTrainedModel, cache: Any) -> int:
    """Return how many drafts may be looked up where no more of the drafter's could be served."""
    longest = drafter.longest_lookup
    if has_switch(model.config.get_text_config(decoder=True)):
        # how far drafts may reach was checked for the drafter's
        longest = min(longest, drafter.block_size)
    rollback = cache.max_rollback if isinstance(cache, RowwiseCache) else None
    return longest if rollback is None else min(longest, max(rollback - 1, 0))


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
        _refuse("`assistant_model`", "assist a target whose cache can be rolled back", type(model).__name__)
    if (generation_config.num_beams or 1) > 1:
        _refuse("`num_beams`", "be 1 when a drafter assists", generation_config.num_beams, "Use greedy or sampling.")
    if getattr(generation_config, "assistant_ensemble_weight", None) is not None:
        weight = generation_config.assistant_ensemble_weight
        _refuse("`assistant_ensemble_weight`", "be None: it would change the output", weight, "Leave it out.")
    if synced_gpus:
        _refuse("`synced_gpus`", "be False when a drafter assists", synced_gpus, "Use `device_map` to span GPUs.")
    check_cache(model_kwargs.get(CACHE_KEY))
    check_rotary(
        model.config.get_text_config(decoder=True),
        input_ids,
        generation_config,
        model_kwargs,
        num_drafts=num_drafts,
        shares_passes=shares_passes,
    )


def check_cache(cache: Any) -> None:
    """Raise a `ValueError` unless `cache` is one that a rollback leaves no trace in."""
    if not isinstance(cache, Cache):
        given = None if cache is None else type(cache).__name__
        _refuse(
            # MPT's configuration turns it off
            "`use_cache`",
            "be True when a drafter assists, with a Transformers cache",
            given,
            "Pass `use_cache=True`.",
        )
    if not isinstance(cache, DynamicCache) or not cache.is_croppable:
        _refuse(
            "`cache_implementation`",
            "be a dynamic cache that can be rolled back when a drafter assists",
            type(cache).__name__,
            "Leave out `cache_implementation`, or generate without `assistant_model`.",
        )


def _refuse(name: str, rule: str, value: Any, remedy: str = "Generate without `assistant_model`.") -> None:
    raise ValueError(f"{name} must {rule}, got {value!r}. {remedy}")
