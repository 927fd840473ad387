"""Packagings of drafters other than our own, in and out: one small file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark_hf.lazy import lazy_names

if TYPE_CHECKING:
    from dspark_hf.modeling.formats.writing import export

__all__ = ["export"]

__getattr__ = lazy_names(__name__, {"export": "writing"})
