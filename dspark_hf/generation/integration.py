"""The seam into Transformers: the only file that touches its private names.

`generate()` looks its decoding method up on every call (`GenerationMixin._assisted_decoding`). `install` wraps that
method once: a DSpark drafter goes to our loop, every other assistant to the original. Two more methods are wrapped
because what they know is gone when the decoding method is called: which knobs the user set, `scheduler=` among them,
which `generate` does not know, and that an assistant was passed to a mode that ignores it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PrefixConstrainedLogitsProcessor, PreTrainedModel
from transformers.generation import GenerationMode

from dspark_hf.generation.drafting import Drafter

NO_INSTALL_VARIABLE = "DSPARK_HF_NO_INSTALL"

# transformers 5.24 renamed the cache argument of every forward pass, of generate and of its output
CACHE_KEY = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"

_SEAM = "_assisted_decoding"
_CONFIG_SEAM = "_prepare_generation_config"
_MODE_SEAM = "_validate_generation_mode"
_EXPECTED_ARGUMENTS = (
    "input_ids",
    "logits_processor",
    "stopping_criteria",
    "generation_config",
    "streamer",
    "assistant_model",
    "model_kwargs",
)
# run-time knobs whose defaults Transformers fills in for other kinds of assistants
_KNOBS = ("num_assistant_tokens", "assistant_confidence_threshold")
_EXPLICIT = "_dspark_explicit"
_SCHEDULER = "_dspark_scheduler"


def install() -> None:
    """Let `generate(assistant_model=drafter)` run DSpark.

    Importing `dspark_hf` calls this; calling it again is harmless.

    Raises:
        RuntimeError: if this version of Transformers does not have the seam that is wrapped.
    """
    if is_installed():
        return
    _check_seam()
    setattr(GenerationMixin, _SEAM, _route(getattr(GenerationMixin, _SEAM)))
    setattr(GenerationMixin, _CONFIG_SEAM, _remember_knobs(getattr(GenerationMixin, _CONFIG_SEAM)))
    setattr(GenerationMixin, _MODE_SEAM, _check_mode(getattr(GenerationMixin, _MODE_SEAM)))


def uninstall() -> None:
    """Give Transformers its own methods back; `custom_generate=drafter.decode` still works."""
    for name in (_SEAM, _CONFIG_SEAM, _MODE_SEAM):
        method = getattr(GenerationMixin, name)
        if getattr(method, "is_dspark", False):
            setattr(GenerationMixin, name, method.__wrapped__)


def is_installed() -> bool:
    """Return whether `install` is in effect."""
    return getattr(getattr(GenerationMixin, _SEAM, None), "is_dspark", False)


def install_unless_refused() -> None:
    """Install, unless the environment variable `DSPARK_HF_NO_INSTALL` is set."""
    if not os.environ.get(NO_INSTALL_VARIABLE):
        install()


def _check_seam() -> None:
    method = getattr(GenerationMixin, _SEAM, None)
    arguments = () if method is None else tuple(inspect.signature(method).parameters)
    missing = [name for name in _EXPECTED_ARGUMENTS if name not in arguments]
    missing += [name for name in (_CONFIG_SEAM, _MODE_SEAM) if not hasattr(GenerationMixin, name)]
    if missing:
        raise RuntimeError(
            f"`transformers` must be a version that dspark_hf knows (>=5.17,<6), got {transformers.__version__}, "
            f"whose `GenerationMixin.{_SEAM}` and its kin lack {missing}. Install another version, or set "
            f"{NO_INSTALL_VARIABLE}=1 and use `custom_generate=drafter.decode`."
        )


def _route(original: Any) -> Any:
    @functools.wraps(original)
    def assisted_decoding(self: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Any:
        if not isinstance(kwargs.get("assistant_model"), Drafter):
            return original(self, input_ids, **kwargs)
        # imported here: the loop itself reads this file's names
        from dspark_hf.generation.decoding import decode

        return decode(self, input_ids, drafter=kwargs.pop("assistant_model"), **kwargs)

    # mypy knows no attributes of functions
    assisted_decoding.is_dspark = True  # type: ignore[attr-defined]
    return assisted_decoding


def _remember_knobs(original: Any) -> Any:
    @functools.wraps(original)
    def prepare_generation_config(
        self: PreTrainedModel, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> Any:
        given = [
            source for source in (generation_config, getattr(self, "generation_config", None)) if source is not None
        ]
        explicit = {
            name for name in _KNOBS if kwargs.get(name) is not None or any(_is_set(source, name) for source in given)
        }
        # generate takes what it does not know for an input of the model, and refuses it
        scheduler = kwargs.pop("scheduler", None)
        prepared, model_kwargs = original(self, generation_config, **kwargs)
        setattr(prepared, _EXPLICIT, explicit)
        setattr(prepared, _SCHEDULER, scheduler)
        return prepared, model_kwargs

    # mypy knows no attributes of functions
    prepare_generation_config.is_dspark = True  # type: ignore[attr-defined]
    return prepare_generation_config


def _is_set(source: GenerationConfig, name: str) -> bool:
    # a config that was prepared before, as the Pipeline's is in 5.17, has Transformers' defaults filled in
    return getattr(source, name, None) is not None and name in getattr(source, _EXPLICIT, _KNOBS)


def _check_mode(original: Any) -> Any:
    @functools.wraps(original)
    def validate_generation_mode(
        self: PreTrainedModel,
        generation_mode: GenerationMode,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> Any:
        if isinstance(generation_mode_kwargs.get("assistant_model"), Drafter):
            if generation_mode != GenerationMode.ASSISTED_GENERATION:
                raise ValueError(
                    f"`num_beams` must be 1 when a drafter assists, got the mode {generation_mode.value!r}. Use "
                    "greedy decoding or sampling, or generate without `assistant_model`."
                )
            if generation_config.do_sample and generation_config.num_return_sequences > 1:
                # the original refuses, since its own loop knows a single row only
                generation_config = copy.copy(generation_config)
                generation_config.num_return_sequences = 1
        elif scheduler_of_call(generation_config) is not None:
            raise ValueError(
                "`scheduler` must be left out unless a DSpark drafter assists, got "
                f"{scheduler_of_call(generation_config)!r}. Pass `assistant_model=drafter`."
            )
        return original(self, generation_mode, generation_config, generation_mode_kwargs)

    # mypy knows no attributes of functions
    validate_generation_mode.is_dspark = True  # type: ignore[attr-defined]
    return validate_generation_mode


def explicit_knob(generation_config: GenerationConfig, name: str) -> Any:
    """Return a run-time knob if the user set it, else None; Transformers fills in 20 tokens and a threshold of 0.4."""
    if not is_installed() and not hasattr(generation_config, _EXPLICIT):
        # only a value that differs from Transformers' default is known to be the user's
        value = getattr(generation_config, name, None)
        return None if value in (20, 0.4) else value
    return getattr(generation_config, name) if _is_set(generation_config, name) else None


def scheduler_of_call(generation_config: GenerationConfig) -> Any:
    """Return what the user passed to `generate` as `scheduler=`, or None."""
    return getattr(generation_config, _SCHEDULER, None)


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


def last_positions(num_tokens: int, width: int, device: torch.device) -> Tensor:
    """Return the indices of the last `width` of `num_tokens` positions, for `logits_to_keep`.

    A tensor, since an integer lets Gemma 4's shared layers skip the other positions, and with them our taps.
    """
    return torch.arange(num_tokens - width, num_tokens, device=device)
