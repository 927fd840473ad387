"""Interleaved rotary positions of DeepSeek-V4, plain or with YaRN, in fp32.

E head size, P rotated pairs (half of `qk_rope_head_dim`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig

# cosines and sines, fp32, (*, P)
Rotary = tuple[Tensor, Tensor]


def rotary_tables(config: DeepseekV4DSparkConfig, positions: Tensor, *, is_compressed: bool) -> Rotary:
    """Return cosines and sines `(*, P)` of positions `(*)`.

    Layers with compression (`is_compressed`) have their own base and YaRN; its attention factor is not applied, as in
    the released code.
    """
    theta = config.compress_rope_theta if is_compressed else config.rope_theta
    # computed on the fly: a non-persistent buffer would be left unset by loading on the meta device
    exponents = torch.arange(0, config.qk_rope_head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (exponents / config.qk_rope_head_dim)
    if is_compressed and config.compress_rope_scaling:
        frequencies = _yarn(frequencies, theta, config.qk_rope_head_dim, config.compress_rope_scaling)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def _yarn(frequencies: Tensor, theta: float, size: int, scaling: dict[str, Any]) -> Tensor:
    """Return YaRN's frequencies: slow ones are divided by the factor, fast ones kept, with a ramp between."""
    original = scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return size * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_that_turns(scaling.get("beta_slow", 1))), size - 1)
    pairs = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
    slow = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - slow) + frequencies / scaling["factor"] * slow


def per_head(rotary: Rotary) -> Rotary:
    """Return tables `(*, 1, P)`, the same for all heads."""
    return rotary[0][..., None, :], rotary[1][..., None, :]


def rotate(states: Tensor, rotary: Rotary, *, is_inverse: bool = False) -> Tensor:
    """Rotate the last `2 * P` dimensions of states `(*, E)` as pairs `(2i, 2i + 1)`, computed in fp32.

    `rotary` broadcasts against `(*, P)`. `is_inverse` rotates back.
    """
    cos, sin = rotary
    size = 2 * cos.shape[-1]
    plain, rotated = states[..., :-size], states[..., -size:].float()
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    if is_inverse:
        sin = -sin
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.cat([plain, turned.to(states.dtype)], dim=-1)
