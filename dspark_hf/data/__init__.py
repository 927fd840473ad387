"""Text for training, written by the target itself: sources, writers, and the file they fill."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark_hf.lazy import lazy_names

if TYPE_CHECKING:
    from dspark_hf.data.session import DataOptions, collect

__all__ = [
    "DataOptions",
    "collect",
]

__getattr__ = lazy_names(
    __name__,
    {
        "DataOptions": "session",
        "collect": "session",
    },
)
