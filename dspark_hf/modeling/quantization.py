"""Drafters whose layers are stored in fewer bits."""

from __future__ import annotations

import copy

from transformers import BitsAndBytesConfig

# read row by row, or used where logits are made: small, and not worth their rounding
_HEADS = ("markov_head", "confidence_head", "lm_head")


def leave_out_heads(config: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """Return a configuration that also skips a drafter's heads, which cannot be quantised and read row by row."""
    chosen = copy.deepcopy(config)
    chosen.llm_int8_skip_modules = sorted({*(config.llm_int8_skip_modules or ()), *_HEADS})
    return chosen
