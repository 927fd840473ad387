"""What users wrap models in, and the model inside."""

from __future__ import annotations

import sys
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel


def unwrap(model: Any) -> Any:
    """Return the model inside `torch.compile`, data parallelism and adapters that live in its own layers.

    Others that only forward what they are asked are no models of Transformers, and stay as they are.
    """
    if isinstance(model, PreTrainedModel) or not isinstance(model, nn.Module):
        return model
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(inner, "get_base_model") and not _changes_inputs(inner):
        inner = inner.get_base_model()
    return model if inner is model else unwrap(inner)


def _changes_inputs(peft_model: Any) -> bool:
    """Return whether an adapter of PEFT prepends prompts, which the model inside knows nothing of."""
    return bool(getattr(peft_model.active_peft_config, "is_prompt_learning", False))


def row_adapter_options(model: nn.Module) -> set[str]:
    """Return which of PEFT's options that say an adapter, or where one begins, row by row hold for this call.

    PEFT keeps them in hooks of its layers, and hands none on to `generate`.
    """
    if "peft" not in sys.modules:
        # a model may have ten thousand modules
        return set()
    # a dictionary of PyTorch's own, which it offers no other way to read
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return {name for hook in hooks for name in getattr(hook, "keywords", ())} & {"adapter_names", "alora_offsets"}
