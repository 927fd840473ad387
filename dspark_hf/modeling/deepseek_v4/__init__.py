"""DeepSeek-V4 as a target, with its DSpark module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark_hf.lazy import lazy_names

if TYPE_CHECKING:
    from dspark_hf.modeling.deepseek_v4.tiny import write_tiny_checkpoint

__all__ = ["write_tiny_checkpoint"]

__getattr__ = lazy_names(__name__, {"write_tiny_checkpoint": "tiny"})
