"""The seam into Transformers' pipelines: `pipeline(..., assistant_model="auto")`, and drafters by name there."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dspark_hf.generation.call.names import find_assistant
from dspark_hf.lazy import when_imported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODULE = "transformers.pipelines.base"
_SEAM = "load_assistant_model"


def install_in_pipelines() -> None:
    """Let pipelines take `assistant_model="auto"`, and drafters in every layout by name; once they are imported."""
    when_imported(_MODULE, _wrap)


def uninstall_from_pipelines() -> None:
    """Give pipelines their own way of loading assistants back."""
    when_imported(_MODULE, _unwrap)


def _wrap(module: ModuleType) -> None:
    original = getattr(module, _SEAM, None)
    # another version may load assistants otherwise: names then work in `generate` alone
    if original is not None and not getattr(original, "is_dspark", False):
        setattr(module, _SEAM, _route(original))


def _unwrap(module: ModuleType) -> None:
    method: Any = getattr(module, _SEAM, None)
    if getattr(method, "is_dspark", False):
        setattr(module, _SEAM, method.__wrapped__)


def _route(original: Any) -> Any:
    @functools.wraps(original)
    def load_assistant_model(model: PreTrainedModel, assistant_model: Any, assistant_tokenizer: Any) -> Any:
        if isinstance(assistant_model, str) and model.can_generate():
            found = find_assistant(assistant_model, model, only_drafters=True)
            if found is not None:
                # it reads the target's tokens, whatever special ones its configuration names
                return found, None
        return original(model, assistant_model, assistant_tokenizer)

    # mypy knows no attributes of functions
    load_assistant_model.is_dspark = True  # type: ignore[attr-defined]
    return load_assistant_model
