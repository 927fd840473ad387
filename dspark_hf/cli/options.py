"""Choices that several commands offer."""

from __future__ import annotations

from enum import Enum


class Dtype(str, Enum):
    """What models compute in; `auto` is the target's own."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Attention(str, Enum):
    """How attention is computed; `auto` is what Transformers chooses."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
