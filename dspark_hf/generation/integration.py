"""The seam into Transformers: `generate(assistant_model=drafter)` comes to our loop here.

`generate()` looks its decoding method up on every call (`GenerationMixin._assisted_decoding`). `install` wraps that
method once: a DSpark drafter goes to our loop, every other assistant to the original. Two more methods are wrapped
because what they know is gone when the decoding method is called: which knobs the user set, `scheduler=` and `drafts=`
among them, which `generate` does not know, and that an assistant was passed to a mode that ignores it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from typing import Any

import transformers
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode

from dspark_hf.generation.compat import DRAFTS, EXPLICIT, KNOBS, SCHEDULER, SEAM, is_installed, is_set
from dspark_hf.generation.decoding import decode
from dspark_hf.generation.drafting.interface import Drafter

NO_INSTALL_VARIABLE = "DSPARK_HF_NO_INSTALL"

# arguments of `generate` that are ours alone, and where a prepared configuration keeps them
_OURS = {"scheduler": SCHEDULER, "drafts": DRAFTS}
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


def install() -> None:
    """Let `generate(assistant_model=drafter)` run DSpark.

    Importing `dspark_hf` calls this; calling it again is harmless.

    Raises:
        RuntimeError: if this version of Transformers does not have the seam that is wrapped.
    """
    if is_installed():
        return
    _check_seam()
    setattr(GenerationMixin, SEAM, _route(getattr(GenerationMixin, SEAM)))
    setattr(GenerationMixin, _CONFIG_SEAM, _remember_knobs(getattr(GenerationMixin, _CONFIG_SEAM)))
    setattr(GenerationMixin, _MODE_SEAM, _check_mode(getattr(GenerationMixin, _MODE_SEAM)))


def uninstall() -> None:
    """Give Transformers its own methods back; `custom_generate=drafter.decode` still works."""
    for name in (SEAM, _CONFIG_SEAM, _MODE_SEAM):
        method = getattr(GenerationMixin, name)
        if getattr(method, "is_dspark", False):
            setattr(GenerationMixin, name, method.__wrapped__)


def install_unless_refused() -> None:
    """Install, unless the environment variable `DSPARK_HF_NO_INSTALL` is set."""
    if not os.environ.get(NO_INSTALL_VARIABLE):
        install()


def _check_seam() -> None:
    method = getattr(GenerationMixin, SEAM, None)
    arguments = () if method is None else tuple(inspect.signature(method).parameters)
    missing = [name for name in _EXPECTED_ARGUMENTS if name not in arguments]
    missing += [name for name in (_CONFIG_SEAM, _MODE_SEAM) if not hasattr(GenerationMixin, name)]
    if missing:
        raise RuntimeError(
            f"`transformers` must be a version that dspark_hf knows (>=5.17,<6), got {transformers.__version__}, "
            f"whose `GenerationMixin.{SEAM}` and its kin lack {missing}. Install another version, or set "
            f"{NO_INSTALL_VARIABLE}=1 and use `custom_generate=drafter.decode`."
        )


def _route(original: Any) -> Any:
    @functools.wraps(original)
    def assisted_decoding(self: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Any:
        if not isinstance(kwargs.get("assistant_model"), Drafter):
            return original(self, input_ids, **kwargs)
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
            name for name in KNOBS if kwargs.get(name) is not None or any(is_set(source, name) for source in given)
        }
        # generate takes what it does not know for an input of the model, and refuses it
        ours = {kept: kwargs.pop(name, None) for name, kept in _OURS.items()}
        prepared, model_kwargs = original(self, generation_config, **kwargs)
        setattr(prepared, EXPLICIT, explicit)
        for kept, value in ours.items():
            setattr(prepared, kept, value)
        return prepared, model_kwargs

    # mypy knows no attributes of functions
    prepare_generation_config.is_dspark = True  # type: ignore[attr-defined]
    return prepare_generation_config


def _refuse_ours(generation_config: GenerationConfig) -> None:
    for name, kept in _OURS.items():
        value = getattr(generation_config, kept, None)
        if value is not None:
            raise ValueError(
                f"`{name}` must be left out unless a DSpark drafter assists, got {value!r}. Pass "
                "`assistant_model=drafter`."
            )


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
        else:
            _refuse_ours(generation_config)
        return original(self, generation_mode, generation_config, generation_mode_kwargs)

    # mypy knows no attributes of functions
    validate_generation_mode.is_dspark = True  # type: ignore[attr-defined]
    return validate_generation_mode
