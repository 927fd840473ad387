"""Choices that several commands offer."""

from __future__ import annotations

from enum import Enum


class Dtype(str, Enum):
    """What models compute in; `auto` is the target's own."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
