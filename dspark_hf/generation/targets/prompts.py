"""What a call brings for rows at their own lengths: checked, and told what of it counts.

B batch, P prompt, S columns so far.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.aligned_cache import counts_columns
from dspark_hf.generation.targets.interface import RowwiseCache
from dspark_hf.generation.targets.recurrent_support import can_recompute_rows

_MODALITIES = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}
# types whose padded rows were compared with plain `generate` over images, and what they may be given of them: only
# their prompts are more than tokens and positions
_IMAGE_TYPES = ("gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_IMAGE_INPUTS = {"pixel_values", "image_grid_thw", "mm_token_type_ids"}
_TEXT_INPUTS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", "token_type_ids", CACHE_KEY)


def check_own_cache(cache: RowwiseCache, model_kwargs: dict[str, Any], widest: int) -> None:
    """Raise a `ValueError` unless a target's own cache takes `widest` tokens back, and the input is token ids."""
    if cache.max_rollback is not None and widest > cache.max_rollback:
        raise ValueError(
            f"`max_rollback` must be at least {widest}, the tokens of a verify pass, got {cache.max_rollback}. Set "
            f"`model.config.max_rollback = {widest}`, or draft fewer tokens."
        )
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "`inputs_embeds` must be left out when a drafter assists this target, got embeddings. Pass `input_ids`: "
            "both models need the tokens."
        )


def check_chunks(model_kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` if a prompt that is to be processed in chunks is more than text."""
    others = sorted(name for name in _other_inputs(model_kwargs) if name != "mm_token_type_ids")
    if others:
        raise ValueError(
            "`prefill_chunk_size` must be None for prompts other than text when a drafter assists, got one beside "
            f"{others}. Leave it out."
        )


def has_images(adapter: TargetAdapter, model_kwargs: dict[str, Any], past_length: int = 0) -> bool:
    """Return whether the prompts hold images that a target of padded rows can be shown exactly.

    With a `past_length`, its cache may hold them, which the planes of positions behind them tell.
    """
    others = set(_other_inputs(model_kwargs))
    is_known = adapter.model.config.model_type in _IMAGE_TYPES and others <= _IMAGE_INPUTS
    has_planes = getattr(model_kwargs.get("position_ids"), "ndim", 0) == 3
    return is_known and ("pixel_values" in others or (past_length > 0 and has_planes))


def _other_inputs(model_kwargs: dict[str, Any]) -> list[str]:
    return sorted(
        name
        for given, value in model_kwargs.items()
        if value is not None
        and given not in _TEXT_INPUTS
        and not given.startswith("output_")
        and given != "return_dict"
        for name in _names_of_user(given, value)
    )


def _takes_embeddings(adapter: TargetAdapter, model_kwargs: dict[str, Any], past_length: int) -> bool:
    """Return whether prompts given as embeddings are those of a plain text model, and the whole text so far."""
    is_text_alone = adapter.config is adapter.model.config and not can_recompute_rows(adapter.model)
    return is_text_alone and past_length == 0 and model_kwargs.get("token_type_ids") is None


def check_length(config: PreTrainedConfig, generation_config: GenerationConfig, widest: int) -> None:
    """Raise a `ValueError` if a pass may reach where the target scales its attention by the column of a token.

    Takes its text configuration, and the `widest` verify pass. Rows in one pass would need scales of their own.
    """
    # transformers 5.24: Llama 4's layers without rotation count what the cache holds
    limit = getattr(config, "floor_scale", None) if getattr(config, "attn_temperature_tuning", False) else None
    reach = (generation_config.max_length or 0) + widest
    if limit is not None and 0 in (getattr(config, "no_rope_layers", None) or ()) and reach >= limit:
        raise ValueError(
            f"`max_new_tokens` must keep text and drafts below {limit} tokens for several rows, or padded ones, when "
            f"a drafter assists a target that scales attention by length, got up to {reach}. Ask for fewer tokens, "
            "or generate the rows one by one, unpadded."
        )


def foreign_preparation(model: Any) -> Any:
    """Return who prepares the target's inputs in its place, as PEFT does for prompt and prefix tuning, or None."""
    owner = getattr(vars(model).get("prepare_inputs_for_generation", model), "__self__", model)
    return None if owner is model else owner


def check_preparation(model: Any) -> None:
    """Raise a `ValueError` if the target's inputs are prepared by somebody else."""
    # rows at their own lengths are prepared here, and would go without what is added
    owner = foreign_preparation(model)
    if owner is not None:
        raise ValueError(
            "`prepare_inputs_for_generation` must be the target's own for several rows, or padded ones, when a "
            f"drafter assists, got {type(owner).__name__}'s. Generate without `assistant_model`."
        )


def check_inputs(
    adapter: TargetAdapter, generation_config: GenerationConfig, model_kwargs: dict[str, Any], past_length: int = 0
) -> None:
    """Raise a `ValueError` unless positions can be given, the input is text, its embeddings or images, and no more."""
    others = [] if has_images(adapter, model_kwargs, past_length) else _other_inputs(model_kwargs)
    if others == ["inputs_embeds"] and _takes_embeddings(adapter, model_kwargs, past_length):
        others = []
    # a model of states alone has no use for positions, nor one that counts columns
    needs_none = can_recompute_rows(adapter.model) or counts_columns(adapter.model)
    if others or not (adapter.accepts("position_ids") or needs_none):
        raise ValueError(
            "`assistant_model` must be left out for several rows, or padded ones, unless the target takes "
            f"`position_ids` and the input is text alone, got {others or type(adapter.model).__name__}. Generate the "
            "rows one by one, unpadded."
        )
    is_offloaded = getattr(model_kwargs.get(CACHE_KEY), "offloading", False)
    if "offloaded" in (generation_config.cache_implementation or "") or is_offloaded:
        raise ValueError(
            "`cache_implementation` must not be 'offloaded' for several rows, or padded ones, when a drafter assists, "
            "since they share a cache of their own. Leave it out, or generate the rows one by one, unpadded."
        )
    if generation_config.return_dict_in_generate and generation_config.output_attentions:
        raise ValueError(
            "`output_attentions` must be False for several rows, or padded ones, when a drafter assists, got True. "
            "Generate the rows one by one, unpadded."
        )


def _names_of_user(name: str, value: Any) -> list[str]:
    """Return what the user called an input that `generate` prepared."""
    # transformers 5.24 encodes images and sounds at once; the dict is empty where there are none
    if name == "mm_encoder_outputs":
        return [_MODALITIES.get(modality, modality) for modality in value]
    return [name]


def check_positions(position_ids: Tensor | None, mask: Tensor, past_length: int) -> None:
    """Raise a `ValueError` unless `position_ids` count the real tokens of `mask` `(B, S)`, as positions do here."""
    new = mask[:, past_length:]
    implied = (mask.long().cumsum(-1) - 1)[:, past_length:]
    # vision-language models have several planes of them
    given = implied if position_ids is None else position_ids[..., -new.shape[1] :]
    is_other = (given != implied) & new
    if bool(is_other.any()):
        some = given.expand_as(is_other)[is_other][:8].tolist()
        raise ValueError(
            "`position_ids` must count the tokens that `attention_mask` leaves, for several rows, or padded ones, "
            f"when a drafter assists, got {some}. Leave them out, or generate the rows one by one, unpadded."
        )


def embedded_types(adapter: TargetAdapter, token_type_ids: Tensor | None) -> Tensor | None:
    """Return the token types that the target embeds, None if it has none or they only tell text from images."""
    if token_type_ids is None or adapter.config is adapter.model.config:
        return token_type_ids
    if bool(token_type_ids.any()):
        raise ValueError(
            "`token_type_ids` must be 0, those of text, for several rows, or padded ones, when a drafter assists, got "
            f"{int(token_type_ids.max())}. Generate the rows one by one, unpadded."
        )
    return None
