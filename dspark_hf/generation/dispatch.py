"""Passes on a CPU without the kernels that autograd puts before every operator.

Under `no_grad` too PyTorch sends each operator through autograd's kernels, which only hand it on to those that
compute. A pass over a few tokens consists of some thousand small operators, and that takes a twentieth of it. What is
left out is what `torch.inference_mode` leaves out, but tensors stay ordinary ones, to be changed and trained on later.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dspark_hf.generation.grouping import passes_here

# what PyTorch's own custom operators use; without it passes take the usual way
_BELOW: Any = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView", None)
# Models and hooks of others may differentiate within a pass. None of these do.
_KNOWN = ("transformers", "dspark_hf")


def below_autograd(model: nn.Module) -> AbstractContextManager[Any]:
    """Let this thread's operators skip autograd for a pass of `model`, if that changes nothing but the time.

    That is so in our calls on CPUs (within `grouped_attention`), for models that cannot need a gradient in a pass.
    Only the pass may lie within: code of the caller's may do anything.
    """
    passes = passes_here()
    if _BELOW is None or passes is None or _is_watched() or not passes.recall(model, _needs_no_gradients):
        return nullcontext()
    return _BELOW()


def _is_watched() -> bool:
    """Return whether operators mean more to this thread than numbers."""
    return (
        torch.is_grad_enabled()
        # casts of weights are kept, for passes with gradients too
        or torch.is_autocast_enabled("cpu")
        # whoever counts operators knows those that autograd's kernels divide others into
        or is_in_torch_dispatch_mode()
    )


def _needs_no_gradients(model: nn.Module) -> bool:
    """Return whether nothing in a pass of the model is of unknown origin."""
    return (
        _is_known(type(model))
        # products of theirs may be autograd's own functions
        and not getattr(model, "is_quantized", False)
        and next(model.parameters()).device.type == "cpu"
        and all(
            _is_known(hook)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )
    )


def _is_known(code: Any) -> bool:
    return str(getattr(code, "__module__", None)).partition(".")[0] in _KNOWN
