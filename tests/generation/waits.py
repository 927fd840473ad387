"""How often the host waits for a value that the device knows: what an accelerator cannot hide behind its queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# operators whose result, or its size, the host must know
_ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
# a method that reads memory past the operators
_READING = {torch.Tensor.tolist, torch.Tensor.numpy}


class Waits:
    """Number of waits so far."""

    def __init__(self) -> None:
        self.count = 0


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_masked = func.overloadpacket.__name__ == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self._waits.count += is_masked or func.overloadpacket.__name__ in _ASKING
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._waits.count += func in _READING
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits() -> Iterator[Waits]:
    """Count the waits of a block."""
    waits = Waits()
    with _Operators(waits), _Methods(waits):
        yield waits
