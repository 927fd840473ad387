"""The seam into Transformers: `generate(assistant_model=drafter)` comes to our loop here.

`generate()` looks its decoding method up on every call (`GenerationMixin._assisted_decoding`). `install` wraps that
method once: a DSpark drafter goes to our loop, every other assistant to the original. Three more methods are wrapped
because what they know is gone when the decoding method is called: which knobs the user set, `scheduler=`, `drafts=`
and `sampling=` among them, which `generate` does not know, that an assistant was passed by its name or to a mode that
ignores it, and a streamer beside `custom_generate`. `generate_batch`, which would drop a drafter without a word, is
wrapped to refuse it. Pipelines have a seam of their own (`pipelines.py`).
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import logging

from dspark_hf.generation.call.names import find_assistant
from dspark_hf.generation.compat import DRAFTS, EXPLICIT, SAMPLING, SCHEDULER, SEAM, is_installed
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.pipelines import install_in_pipelines, uninstall_from_pipelines

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation import GenerationMode

# `import dspark_hf` brings this file: what only a call of `generate` needs is imported in one

NO_INSTALL_VARIABLE = "DSPARK_HF_NO_INSTALL"

_LOGGER = logging.get_logger(__name__)
# arguments of `generate` that are ours alone, and where a prepared configuration keeps them
_OURS = {"scheduler": SCHEDULER, "drafts": DRAFTS, "sampling": SAMPLING}
_CONFIG_SEAM = "_prepare_generation_config"
_MODE_SEAM = "_validate_generation_mode"
_DOOR_SEAM = "_extract_generation_mode_kwargs"
_BATCH = "generate_batch"
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
    setattr(GenerationMixin, _DOOR_SEAM, _keep_streamer(getattr(GenerationMixin, _DOOR_SEAM)))
    setattr(_owner(_BATCH), _BATCH, _refuse_drafter(getattr(GenerationMixin, _BATCH)))
    install_in_pipelines()


def uninstall() -> None:
    """Give Transformers its own methods back; `custom_generate=drafter.decode` still works."""
    for name in (SEAM, _CONFIG_SEAM, _MODE_SEAM, _DOOR_SEAM, _BATCH):
        method = getattr(GenerationMixin, name)
        if getattr(method, "is_dspark", False):
            setattr(_owner(name), name, method.__wrapped__)
    uninstall_from_pipelines()


def install_unless_refused() -> None:
    """Install, unless the environment variable `DSPARK_HF_NO_INSTALL` is set."""
    if not os.environ.get(NO_INSTALL_VARIABLE):
        install()


def _check_seam() -> None:
    method = getattr(GenerationMixin, SEAM, None)
    arguments = () if method is None else tuple(inspect.signature(method).parameters)
    missing = [name for name in _EXPECTED_ARGUMENTS if name not in arguments]
    others = (_CONFIG_SEAM, _MODE_SEAM, _DOOR_SEAM, _BATCH)
    missing += [name for name in others if not hasattr(GenerationMixin, name)]
    if missing:
        raise RuntimeError(
            f"`transformers` must be a version that dspark_hf knows (>=5.17,<6), got {transformers.__version__}, "
            f"whose `GenerationMixin.{SEAM}` and its kin lack {missing}. Install another version, or set "
            f"{NO_INSTALL_VARIABLE}=1 and use `custom_generate=drafter.decode`."
        )


def _owner(name: str) -> type:
    """Return the class whose method `name` is; `generate_batch` is inherited."""
    return next(owner for owner in GenerationMixin.__mro__ if name in vars(owner))


def _route(original: Any) -> Any:
    @functools.wraps(original)
    def assisted_decoding(self: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Any:
        if not isinstance(kwargs.get("assistant_model"), Drafter):
            return original(self, input_ids, **kwargs)
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
        from dspark_hf.generation.call.knobs import choose_knobs

        chosen = choose_knobs(kwargs, generation_config, getattr(self, "generation_config", None))
        # generate takes what it does not know for an input of the model, and refuses it
        ours = {kept: kwargs.pop(name, None) for name, kept in _OURS.items()}
        prepared, model_kwargs = original(self, generation_config, **kwargs)
        for name, value in chosen.items():
            setattr(prepared, name, value)
        explicit = set(chosen)
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
        from dspark_hf.generation.call.checks import check_mode
        from dspark_hf.generation.wrappers import unwrap

        assistant = generation_mode_kwargs.get("assistant_model")
        if isinstance(assistant, str):
            assistant = find_assistant(assistant, self)
            # the decoding method is called with what these hold
            generation_mode_kwargs["assistant_model"] = assistant
        drafter = unwrap(assistant)
        if isinstance(drafter, Drafter):
            generation_mode_kwargs["assistant_model"] = drafter
            check_mode(self, generation_mode, generation_config, generation_mode_kwargs)
            return None
        _mention_drafter(assistant)
        _refuse_ours(generation_config)
        return original(self, generation_mode, generation_config, generation_mode_kwargs)

    # mypy knows no attributes of functions
    validate_generation_mode.is_dspark = True  # type: ignore[attr-defined]
    return validate_generation_mode


def _keep_streamer(original: Any) -> Any:
    @functools.wraps(original)
    def extract_generation_mode_kwargs(
        self: PreTrainedModel, custom_generate: Any, kwargs: dict[str, Any], *args: Any, **others: Any
    ) -> Any:
        tokenizer = kwargs.get("tokenizer")
        given = inspect.signature(original).bind(self, custom_generate, kwargs, *args, **others).arguments
        _check_beams(kwargs, given.get("assistant_model"))
        extracted = original(self, custom_generate, kwargs, *args, **others)
        drafter = getattr(custom_generate, "__self__", None)
        if isinstance(drafter, Drafter) and custom_generate == getattr(drafter, "decode", None):
            # transformers 5.24: both are dropped for a callable, the streamer after it was given the prompt
            kept = {"streamer": given.get("streamer"), "tokenizer": tokenizer}
            extracted |= {name: value for name, value in kept.items() if value is not None}
        return extracted

    # mypy knows no attributes of functions
    extract_generation_mode_kwargs.is_dspark = True  # type: ignore[attr-defined]
    return extract_generation_mode_kwargs


def _check_beams(kwargs: dict[str, Any], assistant: Any) -> None:
    """Raise a `ValueError` if a drafter is to assist beams, before Transformers warns that it will ignore them."""
    num_beams = kwargs.get("num_beams")
    if assistant is not None and isinstance(num_beams, int) and num_beams > 1:
        from dspark_hf.generation.call.checks import refuse_beams
        from dspark_hf.generation.wrappers import unwrap

        if isinstance(unwrap(assistant), Drafter):
            refuse_beams(num_beams)


def _refuse_drafter(original: Any) -> Any:
    @functools.wraps(original)
    def generate_batch(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        assistant = kwargs.get("assistant_model")
        if isinstance(assistant, (Drafter, str)):
            raise ValueError(
                "`assistant_model` must be left out of `generate_batch`, which does not assist, got "
                f"{assistant if isinstance(assistant, str) else type(assistant).__name__}. Use "
                "`dspark_hf.generate_stream(target, requests, drafter=drafter)`, or `generate`."
            )
        return original(self, *args, **kwargs)

    # mypy knows no attributes of functions
    generate_batch.is_dspark = True  # type: ignore[attr-defined]
    return generate_batch


def _mention_drafter(assistant: Any) -> None:
    """Warn once if an assistant of another class was read from a drafter's folder: its heads were dropped."""
    names = getattr(getattr(assistant, "config", None), "architectures", None) or ()
    drafters = [name for name in names if "DSpark" in str(name)]
    if drafters:
        _LOGGER.warning_once(
            f"`assistant_model` is a {type(assistant).__name__} made of a {drafters[0]}: without its DSpark heads it "
            "drafts next to nothing of use. Load it with `DSparkAssistantModel.from_pretrained`, or with "
            "`AutoModel.from_pretrained` after `import dspark_hf`."
        )
