"""Checks of a call of `generate` before any work is done."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.generation import GenerationMode

from dspark_hf.generation.call.rotary import check_rotary
from dspark_hf.generation.call.twins import check_class
from dspark_hf.generation.compat import CACHE_KEY, can_be_cropped, check_supported_modes
from dspark_hf.generation.targets.recurrent_support import can_recompute
from dspark_hf.generation.targets.rollback import check_rollback
from dspark_hf.generation.wrappers import row_adapter_options

# other ways to get drafts
_OTHER_WAYS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def check_mode(
    model: PreTrainedModel,
    mode: GenerationMode,
    generation_config: GenerationConfig,
    mode_kwargs: dict[str, Any],
) -> None:
    """Raise a `ValueError` unless `generate` is asked for what a drafter can assist.

    Stands in for Transformers' own check, which goes by a flag of the target's class, and knows assistants of other
    vocabularies and single rows only. `mode_kwargs` hold the tokenizers, if any.
    """
    if mode == GenerationMode.CONTRASTIVE_SEARCH:
        _refuse(
            "`penalty_alpha`",
            "be None when a drafter assists",
            generation_config.penalty_alpha,
            "It means contrastive search: leave it out, or generate without `assistant_model`.",
        )
    if mode != GenerationMode.ASSISTED_GENERATION:
        refuse_beams(generation_config.num_beams, mode)
    check_class(model)
    check_supported_modes(model)
    check_rollback(model)
    num_sequences = generation_config.num_return_sequences or 1
    if num_sequences > 1 and not generation_config.do_sample:
        _refuse("`num_return_sequences`", "be 1 for greedy decoding", num_sequences, "Set `do_sample=True`.")
    if mode_kwargs.get("assistant_tokenizer") is not None:
        _refuse(
            "`assistant_tokenizer`",
            "be left out when a DSpark drafter assists: it speaks the target's own tokens",
            type(mode_kwargs["assistant_tokenizer"]).__name__,
            "Leave it out.",
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
    check_class(model)
    if model.config.is_encoder_decoder:
        _refuse("`assistant_model`", "assist a decoder-only target", f"the encoder-decoder {type(model).__name__}")
    check_rollback(model)
    if not len(input_ids):
        _refuse("`input_ids`", "hold a row", tuple(input_ids.shape), "Pass a prompt.")
    for name in _OTHER_WAYS:
        value = getattr(generation_config, name, None)
        if value is not None and value is not False:
            _refuse(f"`{name}`", "be None when a drafter assists", value, "Leave out one of the two: each drafts.")
    if getattr(generation_config, "dola_layers", None) is not None:
        _refuse("`dola_layers`", "be None when a drafter assists", generation_config.dola_layers)
    if (generation_config.num_beams or 1) > 1:
        refuse_beams(generation_config.num_beams)
    if getattr(generation_config, "assistant_ensemble_weight", None) is not None:
        weight = generation_config.assistant_ensemble_weight
        _refuse("`assistant_ensemble_weight`", "be None: it would change the output", weight, "Leave it out.")
    if "alora_offsets" in row_adapter_options(model):
        rule = "be None when a drafter assists: they are counted from the end of a pass"
        _refuse("`alora_offsets`", rule, "offsets", "Generate without `assistant_model`, or with a LoRA.")
    if synced_gpus:
        _refuse("`synced_gpus`", "be False when a drafter assists", synced_gpus, "Use `device_map` to span GPUs.")
    cache = model_kwargs.get(CACHE_KEY)
    if isinstance(cache, StaticCache) and not shares_passes:
        check_static_cache(cache, generation_config, has_states=can_recompute(model))
    else:
        check_cache(cache, generation_config, has_states=can_recompute(model))
    check_rotary(
        model.config.get_text_config(decoder=True),
        input_ids,
        generation_config,
        model_kwargs,
        num_drafts=num_drafts,
        shares_passes=shares_passes,
    )


def check_cache(cache: Any, generation_config: GenerationConfig, *, has_states: bool = False) -> None:
    """Raise a `ValueError` unless `cache` is one that a rollback leaves no trace in.

    With `has_states`, those of recurrent layers are taken back by other means than a crop.
    """
    if cache is None:
        # MPT's configuration turns it off
        _refuse("`use_cache`", "be True when a drafter assists", generation_config.use_cache, "Pass `use_cache=True`.")
    if not isinstance(cache, Cache):
        _refuse(
            f"`{CACHE_KEY}`",
            "be a cache of Transformers when a drafter assists",
            type(cache).__name__,
            "Leave it out, or generate without `assistant_model`.",
        )
    if not isinstance(cache, DynamicCache) or not (has_states or can_be_cropped(cache)):
        _refuse(
            "`cache_implementation`",
            "be a dynamic cache that can be rolled back when a drafter assists",
            type(cache).__name__,
            "Leave out `cache_implementation`, or generate without `assistant_model`.",
        )


def check_static_cache(cache: StaticCache, generation_config: GenerationConfig, *, has_states: bool) -> None:
    """Raise a `ValueError` unless the tokens of a static `cache` can be kept by rows, and put into it at the end."""
    if has_states or not all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        _refuse(
            "`cache_implementation`",
            "be a dynamic cache for this target when a drafter assists",
            f"a static cache of {kinds}",
            "Leave it out.",
        )
    if cache.offloading:
        _refuse(
            "`cache_implementation`",
            "keep its layers on their devices when a drafter assists",
            generation_config.cache_implementation or "an offloaded cache",
            'Pass "static", or leave it out.',
        )
    held = int(cache.get_seq_length())
    if held:
        _refuse(
            f"`{CACHE_KEY}`",
            "be empty or a dynamic cache when a drafter assists",
            f"a static cache of {held} tokens",
            "Pass the whole text with an empty one, or go on from a `DynamicCache`.",
        )
    _check_room(cache, generation_config)


def _check_room(cache: StaticCache, generation_config: GenerationConfig) -> None:
    # a sliding layer has as much room as its window
    rooms = [layer.get_max_length() for layer in cache.layers if type(layer) is StaticLayer]
    needed = (generation_config.max_length or 0) - 1
    if rooms and min(rooms) < needed:
        _refuse(
            f"`{CACHE_KEY}`",
            f"have room for `max_length` - 1 = {needed} tokens",
            f"a static cache for {min(rooms)}",
            "Make it longer, or generate fewer tokens.",
        )


def refuse_beams(num_beams: int | None, mode: GenerationMode | None = None) -> None:
    """Raise a `ValueError`: beams are not assisted, nor any other `mode` than greedy decoding and sampling."""
    value = f"the mode {mode.value!r}" if mode is not None and (num_beams or 1) == 1 else num_beams
    raise ValueError(
        f"`num_beams` must be 1 when a drafter assists, got {value}. Use greedy decoding or sampling, or generate "
        "without `assistant_model`."
    )


def _refuse(name: str, rule: str, value: Any, remedy: str = "Generate without `assistant_model`.") -> None:
    raise ValueError(f"{name} must {rule}, got {value!r}. {remedy}")
