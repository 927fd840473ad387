"""What is private to Transformers, or differs between its versions; `integration.py` wraps methods beside it."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PrefixConstrainedLogitsProcessor, PreTrainedModel

# transformers 5.24 renamed the cache argument of every forward pass, of generate and of its output
CACHE_KEY = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"

# the decoding method that `generate` looks up on every call
SEAM = "_assisted_decoding"
# run-time knobs whose defaults Transformers fills in for other kinds of assistants
KNOBS = ("num_assistant_tokens", "assistant_confidence_threshold")
# where a prepared generation configuration keeps what the user said
EXPLICIT = "_dspark_explicit"
SCHEDULER = "_dspark_scheduler"
DRAFTS = "_dspark_drafts"


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
        value = getattr(generation_config, name, None)
        return None if value in (20, 0.4) else value
    return getattr(generation_config, name) if is_set(generation_config, name) else None


def scheduler_of_call(generation_config: GenerationConfig) -> Any:
    """Return what the user passed to `generate` as `scheduler=`, or None."""
    return getattr(generation_config, SCHEDULER, None)


def drafts_of_call(generation_config: GenerationConfig) -> Any:
    """Return what the user passed to `generate` as `drafts=`, or put into a generation configuration, or None."""
    # Transformers keeps fields that it does not know
    given = getattr(generation_config, DRAFTS, None)
    return getattr(generation_config, "drafts", None) if given is None else given


def bind_row(processor: PrefixConstrainedLogitsProcessor, row: int) -> PrefixConstrainedLogitsProcessor:
    """Return the processor as it acts on one row of the batch."""
    allowed = processor._prefix_allowed_tokens_fn
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
    return bool(getattr(model, "_is_stateful", False))


def was_given_by_user(cache: Any) -> bool:
    """Return whether the user passed this cache to `generate`."""
    return bool(getattr(cache, "_is_user_defined", False))


def is_placeholder_layer(layer: Any) -> bool:
    """Return whether a cache layer holds nothing, since its decoder layer reads another one's keys and values."""
    if Version(transformers.__version__) < Version("5.23"):
        return False
    from transformers.cache_utils import DummyLayer

    return isinstance(layer, DummyLayer)


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
