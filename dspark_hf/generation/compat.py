"""What is private to Transformers, or differs between its versions; `integration.py` wraps methods beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PrefixConstrainedLogitsProcessor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from transformers.generation import GenerationMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers 5.24 renamed the cache argument of every forward pass, of generate and of its output
CACHE_KEY = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"

# the decoding method that `generate` looks up on every call
SEAM = "_assisted_decoding"
# run-time knobs; Transformers fills in defaults of the last two for other kinds of assistants
KNOBS = ("scheduler", "drafts", "sampling", "draft_tree", "num_assistant_tokens", "assistant_confidence_threshold")
_FILLED_IN = {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.4}
# where a prepared generation configuration keeps which of them the user set, and what the call itself said
EXPLICIT = "_dspark_explicit"
SCHEDULER = "_dspark_scheduler"
DRAFTS = "_dspark_drafts"
SAMPLING = "_dspark_sampling"
DRAFT_TREE = "_dspark_draft_tree"


def is_installed() -> bool:
    """Return whether `install` is in effect."""
    return getattr(getattr(GenerationMixin, SEAM, None), "is_dspark", False)


def is_set(source: GenerationConfig, name: str) -> bool:
    """Return whether the user set a run-time knob in this configuration."""
    # a config that was prepared before, as the Pipeline's is in 5.17, has Transformers' defaults filled in
    return getattr(source, name, None) is not None and name in getattr(source, EXPLICIT, KNOBS)


def explicit_knob(generation_config: GenerationConfig, name: str) -> Any:
    """Return a run-time knob if the user set it, else None; Transformers fills in 20 tokens and a threshold of 0.4."""
    if not is_installed() and not hasattr(generation_config, EXPLICIT):
        # only a value that differs from Transformers' default is known to be the user's
        value, filled_in = getattr(generation_config, name, None), _FILLED_IN.get(name)
        return None if value == filled_in else value
    return getattr(generation_config, name) if is_set(generation_config, name) else None


def user_function(processor: Any) -> Any:
    """Return the `prefix_allowed_tokens_fn` of a `PrefixConstrainedLogitsProcessor`."""
    return processor._prefix_allowed_tokens_fn


def bind_row(processor: PrefixConstrainedLogitsProcessor, row: int) -> PrefixConstrainedLogitsProcessor:
    """Return the processor as it acts on one row of the batch."""
    allowed = user_function(processor)
    # several returned sequences of one prompt share its number
    number = row // processor._num_beams
    return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(number, ids), 1)


def pad_token_id(generation_config: GenerationConfig) -> int:
    """Return the padding token `generate` prepared, or 0 if there is none."""
    tensor = getattr(generation_config, "_pad_token_tensor", None)
    return 0 if tensor is None else int(tensor)


def mask_length(generation_config: GenerationConfig, attention_mask: Tensor | None) -> int:
    """Return the width of the attention mask the user gave, which `generate` drops when it is all ones."""
    if attention_mask is not None:
        return attention_mask.shape[1]
    return int(getattr(generation_config, "_mask_length", -1))


def is_stateful(model: PreTrainedModel) -> bool:
    """Return whether the model keeps a state that Transformers cannot take back."""
    if not getattr(model, "_is_stateful", False):
        return False
    # the flag is the class's: a hybrid one may be configured with attention alone
    if getattr(model.config.get_text_config(decoder=True), "layer_types", None) is None:
        return True
    return not all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or is_placeholder_layer(layer)
        for layer in empty_cache_like(model).layers
    )


def makes_own_cache(model: Any) -> bool:
    """Return whether `generate` leaves the cache to the model, since it knows none of Transformers' own."""
    return not model._supports_default_dynamic_cache()


def check_supported_modes(model: PreTrainedModel) -> None:
    """Raise a `ValueError` if the model's class names the ways to decode that it knows, without assistance."""
    modes = getattr(model, "_supported_generation_modes", None)
    if modes is not None and GenerationMode.ASSISTED_GENERATION not in modes:
        raise ValueError(
            f"`assistant_model` must be left out for {type(model).__name__}, got one. Its class knows "
            f"{[mode.value for mode in modes]} only."
        )


def was_given_by_user(cache: Any) -> bool:
    """Return whether the user passed this cache to `generate`."""
    return bool(getattr(cache, "_is_user_defined", False))


def is_placeholder_layer(layer: Any) -> bool:
    """Return whether a cache layer holds nothing, since its decoder layer reads another one's keys and values."""
    if Version(transformers.__version__) < Version("5.23"):
        return False
    from transformers.cache_utils import DummyLayer

    return isinstance(layer, DummyLayer)


def can_be_cropped(cache: transformers.Cache) -> bool:
    """Return whether tokens can be taken back without a trace, as far as the cache knows before a pass."""
    return cache.is_croppable or (
        # convolutions say no until they hold something, since a recurrent state might come with it
        any(map(_is_empty_state, cache.layers))
        and all(layer.is_croppable or _is_empty_state(layer) for layer in cache.layers)
    )


def _is_empty_state(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not (
        any(layer.is_conv_states_initialized.values()) or any(layer.is_recurrent_states_initialized.values())
    )


def stop_recording(cache: Any) -> None:
    """Let the cache forget on update again, as before `activate_past_recording`."""
    for layer in cache.layers:
        # transformers 5.24: sliding and linear layers have the flag, and no method to take it back
        if getattr(layer, "record_past", False):
            layer.record_past = False


def attention_implementation(model: PreTrainedModel) -> str:
    """Return the name of the attention implementation of the text decoder."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def empty_cache_like(model: PreTrainedModel) -> transformers.DynamicCache:
    """Return a fresh dynamic cache with the layer kinds of `model`."""
    return transformers.DynamicCache(config=model.config.get_text_config(decoder=True))


def is_static(cache: Any) -> bool:
    """Return whether a cache has its size from the start."""
    return isinstance(cache, transformers.StaticCache)


def compiled_call(
    model: PreTrainedModel, model_kwargs: dict[str, Any], generation_config: GenerationConfig
) -> Callable[..., Any] | None:
    """Return the model's compiled forward pass if plain `generate` would run it in this call, else None."""
    target: Any = model
    if not target._valid_auto_compile_criteria(model_kwargs, generation_config):
        return None
    call: Callable[..., Any] = target.get_compiled_call(generation_config.compile_config)
    # transformers 5.24: of Llama 4 the bare call is returned
    return None if call == model.__call__ else call


def run_compiled(call: Callable[..., Any], *args: Any, **inputs: Any) -> Any:
    """Run a compiled pass whose earlier outputs are no longer needed."""
    # CUDA graphs then know that they may write over them
    torch.compiler.cudagraph_mark_step_begin()
    return call(*args, **inputs)


def compile_options(model: PreTrainedModel, generation_config: GenerationConfig) -> dict[str, Any]:
    """Return the keywords of `torch.compile` with which `get_compiled_call` compiles."""
    config: Any = generation_config.compile_config or model._default_compile_config()
    options: dict[str, Any] = config.to_dict()
    return options
