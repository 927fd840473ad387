"""Passes as calls with a drafter make them on CPUs, for those who measure them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dspark_hf.generation.lean_passes import lean_passes
from dspark_hf.generation.packing import pack_weights, packed_weights


@contextmanager
def fast_passes(*models: Any) -> Iterator[None]:
    """Let this thread's passes of `models` multiply with packed weights, and leave out what they can."""
    pack_weights(*models)
    with packed_weights(*models), lean_passes():
        yield
