"""What passes over few tokens leave out on CPUs: copies of keys that heads share, and autograd's kernels.

Where a pass has a mask, as one over drafts has, Transformers copies keys and values for every head of a group, in
every layer, which behind a long context takes longer than attending to them. The heads of a group attend to the same
keys, so their queries can be rows of one product.

Under `no_grad` too PyTorch sends each operator through autograd's kernels, which only hand it on to those that
compute. A pass over a few tokens consists of some thousand small operators, and that takes a twentieth of it. What is
left out is most of what `torch.inference_mode` leaves out, but tensors stay ordinary ones, to be trained on later.

B batch, W tokens of a pass, S slots, H heads, N of keys and values, G = H / N heads of a group, E head_dim.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dspark_hf.generation.locking import locked

# Passes over more tokens than this are left to Transformers: prompts, whose masks are as large as what would be saved.
# Plain choice: above all blocks and trees of drafts.
MOST_TOKENS = 64
_NAME = "sdpa"
# what PyTorch's own custom operators use; without it passes take the usual way
_BELOW: Any = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView", None)
# Code of others may differentiate within a pass. None of these does.
_KNOWN = ("torch", "transformers", "dspark_hf")
# what takes part in an attention beside queries, keys, values and mask
_UNKNOWN_HERE = ("position_bias", "softcap", "output_attentions")
# of a pass: one for full attention, one for windows
_MOST_MASKS = 2


class ThreadPasses:
    """What the passes of a thread remember within `lean_passes`."""

    def __init__(self) -> None:
        self._made: deque[tuple[Tensor, int, Tensor]] = deque(maxlen=_MOST_MASKS)
        self._known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def recall(self, model: nn.Module, ask: Callable[[nn.Module], bool]) -> bool:
        """Return what `ask` says of a model, or said before."""
        found = self._known.get(model)
        if found is None:
            found = self._known[model] = ask(model)
        return found

    def mask_of_groups(self, mask: Tensor, num_shared: int, dtype: torch.dtype) -> Tensor:
        """Return a mask `(B, 1, W, S)` for queries `(B, N, G * W, E)`, additive, of their `dtype`.

        It is made once, not in each of the layers.
        """
        version = _version(mask)
        rows = mask.shape[2] * (num_shared if mask.shape[2] > 1 else 1)
        for known, known_version, made in self._made:
            if known is mask and known_version == version and made.shape[2] == rows and made.dtype is dtype:
                return made
        # as `scaled_dot_product_attention` itself would
        additive = torch.where(mask, 0.0, -math.inf).to(dtype) if mask.dtype is torch.bool else mask
        made = torch.cat([additive] * (rows // mask.shape[2]), dim=2)
        if version is not None:
            self._made.append((mask, version, made))
        return made


def _version(mask: Tensor) -> int | None:
    """Return what changes when a mask is written to; None where that is not counted."""
    return None if mask.is_inference() else mask._version


_THREADS: dict[int, ThreadPasses] = {}


@contextmanager
def lean_passes(passes: ThreadPasses | None = None) -> Iterator[None]:
    """Let this thread's passes attend by groups, under Transformers' own "sdpa", and below autograd, on CPUs.

    `passes` is what was remembered earlier, if models have been in nobody's hands since.
    """
    has_entered = _enter(passes or ThreadPasses())
    try:
        yield
    finally:
        if has_entered:
            _leave()


def passes_here() -> ThreadPasses | None:
    """Return what this thread's passes remember, or None outside of `lean_passes`."""
    return _THREADS.get(threading.get_ident())


@locked
def _enter(passes: ThreadPasses) -> bool:
    """Let this thread attend by groups; return whether it did not before."""
    thread = threading.get_ident()
    if thread in _THREADS:
        return False
    # whoever has put a function of their own there has it called
    if not _THREADS and ALL_ATTENTION_FUNCTIONS[_NAME] is sdpa_attention_forward:
        ALL_ATTENTION_FUNCTIONS[_NAME] = _attend
    _THREADS[thread] = passes
    return True


@locked
def _leave() -> None:
    """Let this thread attend as ever."""
    _THREADS.pop(threading.get_ident(), None)
    if not _THREADS and ALL_ATTENTION_FUNCTIONS[_NAME] is _attend:
        del ALL_ATTENTION_FUNCTIONS[_NAME]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as Transformers' own function of this signature does, with `query` `(B, H, W, E)`."""
    is_plain = not dropout and not any(_is_given(kwargs.get(name)) for name in _UNKNOWN_HERE)
    # the function is everybody's
    passes = passes_here()
    if passes is None or not (is_plain and _fits(module, query, key, attention_mask)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    batch_size, num_heads, width, _ = query.shape
    num_groups = key.shape[1]
    rows = query.reshape(batch_size, num_groups, -1, query.shape[-1])  # [B, N, G * W, E]
    mask = attention_mask
    if mask is not None:
        mask = passes.mask_of_groups(mask, num_heads // num_groups, query.dtype)
    found = scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(batch_size, num_heads, width, -1).transpose(1, 2).contiguous(), None


def _is_given(value: Any) -> bool:
    # a tensor has no truth value
    return value is not None and value is not False


def _fits(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Return whether the heads of `query` `(B, H, W, E)` that share a head of `key` `(B, N, S, E)` see the same."""
    num_heads, width = query.shape[1:3]
    num_shared = getattr(module, "num_key_value_groups", 1)
    return (
        not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and not torch.is_grad_enabled()
        and num_shared > 1
        and num_heads == num_shared * key.shape[1]
        # queries that are learned may be those of all rows
        and query.shape[0] == key.shape[0]
        and width <= MOST_TOKENS
        # without a mask, tokens of a pass see no later ones; a single one has none
        and (width == 1 if mask is None else mask.shape[1:] == (1, width, key.shape[2]))
    )


def below_autograd(*models: nn.Module) -> AbstractContextManager[Any]:
    """Let this thread's operators skip autograd for a pass of `models`, if that changes nothing but the time.

    That is so in our calls on CPUs (within `lean_passes`), for models that cannot need a gradient in a pass. Only the
    pass may lie within: code of the caller's may do anything.
    """
    passes = passes_here()
    if _BELOW is None or passes is None or _is_watched():
        return nullcontext()
    return _BELOW() if all(passes.recall(model, _needs_no_gradients) for model in models) else nullcontext()


def _is_watched() -> bool:
    """Return whether operators mean more to this thread than numbers."""
    return (
        torch.is_grad_enabled()
        # casts of weights are kept, for passes with gradients too
        or torch.is_autocast_enabled("cpu")
        # whoever counts operators knows those that autograd's kernels divide others into
        or is_in_torch_dispatch_mode()
        or bool(_global_forward_hooks or _global_forward_pre_hooks)
    )


def _needs_no_gradients(model: nn.Module) -> bool:
    """Return whether a pass of the model consists of known code and ordinary tensors.

    Gradients are not all that is lost: in-place operators do not count as versions, and tensors with operators of
    their own are asked for others than they may know.
    """
    return (
        all(map(_is_ordinary, chain(model.parameters(), model.buffers())))
        and all(map(_is_known, _code_of(model)))
        and ALL_ATTENTION_FUNCTIONS[_NAME] in (_attend, sdpa_attention_forward)
        # others may be anybody's, or compiled
        and all(_attention_of(module) in (None, "eager", _NAME) for module in model.modules())
    )


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and type(tensor.data) is Tensor and tensor.device.type == "cpu"


def _attention_of(module: nn.Module) -> str | None:
    name: str | None = getattr(vars(module).get("config"), "_attn_implementation", None)
    return name


def _code_of(model: nn.Module) -> Iterator[Any]:
    """Give what a pass of the model runs: classes, forward passes in their place, and hooks."""
    for module in model.modules():
        yield type(module)
        if "forward" in vars(module):
            yield vars(module)["forward"]
        # calls in other threads put hooks of ours there meanwhile
        yield from list(module._forward_hooks.values())
        yield from list(module._forward_pre_hooks.values())


def _is_known(code: Any) -> bool:
    return _is_known_package(getattr(code, "__module__", None))


@functools.cache
def _is_known_package(name: str | None) -> bool:
    return str(name).partition(".")[0] in _KNOWN
