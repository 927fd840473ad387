"""Linear layers whose weights lie as the CPU's fast products read them.

Passes over few tokens are bound by reading weights, and PyTorch's products of few rows with weights as they were
loaded reach a third of the memory's bandwidth. oneDNN's products with packed weights, which a frozen `torch.compile`
uses as well, take half as long. The packed copy lies beside the weights, and is made again when they change.
"""

from __future__ import annotations

import os
import platform
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn

from dspark_hf.generation.locking import locked

NO_PACKING_VARIABLE = "DSPARK_HF_NO_PACKING"
# Smaller models stay in the processor's caches, where packing brings little. Plain choice.
LEAST_BYTES = 16 * 2**20
# Calls that may write no more tokens than this are made with weights as they are. Plain choice: packing takes as long
# as five to ten plain steps.
FEW_TOKENS = 8
# Weights above this share of the memory are not copied. Plain choice: there is room for as much again several times.
SHARE_OF_MEMORY = 1 / 8
# Rows for which oneDNN lays the weights out. Plain choice: a block of drafts; one row takes no longer.
_ROWS = 8
# Weights are added up in parts of this size. Plain choice: caches hold it, and each takes its time to begin.
_BYTES_OF_A_SUM = 2 * 2**20
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class _PackedLayer:
    """A linear layer that can be made to multiply with a packed copy of its weight.

    Args:
        layer: the layer.
        threads: those that are to multiply so.
        packs_itself: whether it is packed when it is first used, and not before; its weight must not change.
    """

    def __init__(self, layer: nn.Linear | None, threads: set[int], packs_itself: bool = False):
        # the layer may know its model, which must not live on for its copies
        self._layer = None if layer is None else weakref.ref(layer)
        self._threads = threads
        self._packs_itself = packs_itself
        self._state: Any = None
        self._packed: Tensor | None = None

    def __reduce__(self) -> Any:
        # who copies a model during a call has one that multiplies as ever
        return _PackedLayer, (self._known_layer(), set())

    def _known_layer(self) -> nn.Linear | None:
        return None if self._layer is None else self._layer()

    def refresh(self, layer: nn.Linear) -> None:
        """Pack the weight of the layer unless it is the one that is packed already."""
        weight = layer.weight.detach()
        state = _state_of(weight)
        if state == self._state:
            return
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        # another thread may have changed it meanwhile
        self._packed, self._state = (packed, state) if _state_of(weight) == state else (None, None)

    @property
    def is_packed(self) -> bool:
        """Whether there is a packed weight."""
        return self._packed is not None

    def drop(self, layer: nn.Linear) -> None:
        """Let go of the packed weight, in the middle of a pass too."""
        self._packed = self._state = None
        self.remove(layer)

    def install(self, layer: nn.Linear) -> None:
        """Let the layer multiply with it, unless somebody has given it a forward pass meanwhile."""
        # past `Module.__setattr__`, which takes longer
        vars(layer).setdefault("forward", self._forward)

    def remove(self, layer: nn.Linear) -> None:
        """Let the layer multiply as ever."""
        if self.is_installed(layer):
            del vars(layer)["forward"]

    @classmethod
    def is_installed(cls, layer: nn.Module) -> bool:
        """Return whether a layer multiplies by way of this class."""
        return isinstance(getattr(vars(layer).get("forward"), "__self__", None), cls)

    def _forward(self, states: Tensor) -> Tensor:
        layer = self._known_layer()
        assert layer is not None
        # a third of the time of asking the module for them
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        packed = self._packed_now(layer) if weight is not None and self._fits(states, weight, bias) else None
        if packed is None:
            return nn.Linear.forward(layer, states)
        # the product reads a bias as if its elements lay side by side
        return _multiply(states, packed, None if bias is None else bias.detach().contiguous())

    def _packed_now(self, layer: nn.Linear) -> Tensor | None:
        if self._packed is None and self._packs_itself:
            self.refresh(layer)
        return self._packed

    def _fits(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        return (
            not torch.compiler.is_compiling()
            # the layer is the model's, and other threads may run it
            and threading.get_ident() in self._threads
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and type(states) is Tensor
            and states.dtype is weight.dtype
            and (bias is None or bias.dtype is weight.dtype)
            and states.ndim > 1
            and states.numel() > 0
        )


def _multiply(states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(states, packed, bias, "none", [], "")
    return product


class _PackedModel:
    """The packed layers of a model, those beside it, and the threads that use them."""

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[nn.Linear, _PackedLayer] = WeakKeyDictionary()
        self._beside: WeakKeyDictionary[nn.Linear, _PackedLayer] = WeakKeyDictionary()
        self._threads: set[int] = set()

    @property
    def is_inside(self) -> bool:
        """Whether this thread uses packed weights."""
        return threading.get_ident() in self._threads

    @locked
    def choose(self, layers: list[nn.Linear]) -> list[tuple[nn.Linear, _PackedLayer]]:
        """Get these layers ready, and let go of all others."""
        for layer in set(self._layers) - set(layers):
            # whoever is inside multiplies as ever
            self._layers.pop(layer).drop(layer)
        return [(layer, self._layers.setdefault(layer, _PackedLayer(layer, self._threads))) for layer in layers]

    @locked
    def take_beside(self, layer: nn.Linear) -> None:
        """Let a layer that is no part of the model multiply as those of the model do."""
        packed = self._beside.setdefault(layer, _PackedLayer(layer, self._threads, packs_itself=True))
        if self._threads:
            packed.install(layer)

    def _all(self) -> list[tuple[nn.Linear, _PackedLayer]]:
        return [*self._layers.items(), *self._beside.items()]

    @locked
    def enter(self) -> bool:
        """Let this thread use packed weights; return whether it did not before."""
        if self.is_inside:
            return False
        if not self._threads:
            for layer, packed in self._all():
                packed.install(layer)
        self._threads.add(threading.get_ident())
        return True

    @locked
    def leave(self) -> None:
        """Let this thread use the weights as they are."""
        self._threads.discard(threading.get_ident())
        if not self._threads:
            for layer, packed in self._all():
                packed.remove(layer)


_MODELS: WeakKeyDictionary[nn.Module, _PackedModel] = WeakKeyDictionary()


def pack_weights(*models: Any, may_wait: bool = False) -> bool:
    """Pack the weights of models, or what has changed of them, for `packed_weights`.

    That is done on x86 CPUs, in fp32 and, where the processor has products for it, in bf16. Layers with a forward pass
    of their own, quantised or sharded ones, are left as they are, as are small models and those that take more than
    an eighth of the memory. No weight is changed. What is no model is passed over.

    With `may_wait`, models of which nothing is packed yet are only made ready, to be packed by another call within
    `packed_weights`. Returns whether that is so.
    """
    chosen = [pair for model, layers in _packable_layers(models) for pair in _known(model).choose(layers)]
    if may_wait and chosen and not any(packed.is_packed for _, packed in chosen):
        return True
    # this takes long, and holds no lock that calls of other models would wait for
    for layer, packed in chosen:
        packed.refresh(layer)
    return False


def _packable_layers(models: Sequence[Any]) -> Iterator[tuple[nn.Module, list[nn.Linear]]]:
    """Give each model that has something to pack, and let go of what was packed of the others."""
    for model in models:
        layers = _packable(model) if isinstance(model, nn.Module) else []
        if layers:
            yield model, layers
        elif isinstance(model, nn.Module):
            _MODELS.pop(model, None)


def pack_beside(model: nn.Module, layer: nn.Linear) -> None:
    """Have `layer`, which is no part of `model` and does not change, multiply as the packed layers of `model` do.

    It is packed when a pass within `packed_weights` first needs it.
    """
    packed = _packed(model)
    if packed is not None and _is_packable(layer):
        packed.take_beside(layer)


@locked
def _known(model: nn.Module) -> _PackedModel:
    return _MODELS.setdefault(model, _PackedModel())


@contextmanager
def packed_weights(*models: Any) -> Iterator[None]:
    """Let this thread's passes multiply with what `pack_weights` has packed of `models`."""
    entered: list[_PackedModel] = []
    try:
        for packed in filter(None, map(_packed, models)):
            if packed.enter():
                entered.append(packed)
        yield
    finally:
        for packed in entered:
            packed.leave()


def _packed(model: Any) -> _PackedModel | None:
    return _MODELS.get(model) if isinstance(model, nn.Module) else None


def multiplies_packed(model: Any) -> bool:
    """Return whether passes of `model` in this thread multiply with packed weights, as far as it has such layers."""
    packed = _packed(model)
    return packed is not None and packed.is_inside and not torch.is_autocast_enabled("cpu")


def forget_packed(*models: Any) -> None:
    """Let go of the packed weights of `models`, or of all if none is named."""
    for model in models or list(_MODELS):
        _MODELS.pop(model, None)


def _packable(model: nn.Module) -> list[nn.Linear]:
    """Return the layers whose weights are to be packed: all that can be, or none if that is too little or too much."""
    if not can_pack() or os.environ.get(NO_PACKING_VARIABLE):
        return []
    layers = [module for module in model.modules() if type(module) is nn.Linear and _is_packable(module)]
    size = sum(layer.weight.nbytes for layer in layers)
    return layers if LEAST_BYTES <= size <= SHARE_OF_MEMORY * _memory_bytes() else []


def can_pack() -> bool:
    """Return whether this machine has products with packed weights."""
    has_products = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return has_products and platform.machine().lower() in ("x86_64", "amd64")


def _is_packable(layer: nn.Linear) -> bool:
    weight = layer._parameters.get("weight")
    # accelerate and others set a forward pass of their own; weights of tensor parallelism are of another class
    if "forward" in vars(layer) and not _PackedLayer.is_installed(layer):
        return False
    return (
        type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.numel() > 0
        and weight.is_contiguous()
        and _has_products(weight.dtype)
    )


def _has_products(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 or (dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _memory_bytes() -> int:
    """Return how much memory there is, of the container if it has a limit."""
    total: int = psutil.virtual_memory().total
    for limit in _LIMITS:
        # without a limit it says "max", or is not there
        with suppress(OSError, ValueError):
            total = min(total, int(limit.read_text()))
    return total


def _state_of(weight: Tensor) -> tuple[Any, ...]:
    """Return what tells a weight `(D_out, D_in)` from what it was: a copy of it would take its memory once more.

    Its version does not count what is written through `.data`, as LoRA is merged. So its bits are added up as well, as
    integers along the rows and as fp32 along the columns: an integer sum misses pairs of signs, one of fp32 small
    changes, and either the order of what it adds.
    """
    version = None if weight.is_inference() else weight._version
    place = weight.shape, weight.dtype, weight.data_ptr(), version
    if weight.data_ptr() % 8 or weight.storage_offset() * weight.element_size() % 8 or weight.shape[1] % 4:
        # of no size or place for that; such weights are rare, and small
        return *place, zlib.crc32(weight.contiguous().view(torch.uint8).numpy().tobytes())
    flat = weight.view(-1).view(len(weight), -1)
    # the second sum finds what the first one has read in the processor's caches
    parts = flat.split(max(_BYTES_OF_A_SUM // flat[:1].nbytes, 1))
    sums = (one for part in parts for one in (part.view(torch.int64).sum(1), part.view(torch.float32).sum(0)))
    return *place, *(one.numpy().tobytes() for one in sums)
