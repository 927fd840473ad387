"""Rotary positions of a drafter, as its configuration names them.

E head_dim, R rotated entries of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dspark_hf.modeling.configuration_dspark import DSparkConfig


class RotaryEmbedding(nn.Module):
    """Return cosines and sines `(*, R)` for positions `(*)`, fp32 angles.

    `"default"` rotates the first `partial_rotary_factor` of a head, all of it by default. Gemma 4's `"proportional"`
    does too, but keeps the full head's frequencies. `"linear"`, `"yarn"` and `"llama3"` are Transformers' own.
    """

    def __init__(self, config: DSparkConfig):
        super().__init__()
        self.config = config
        # scaled frequencies, by device; a buffer would be left unset by loading on the meta device
        self._scaled: dict[torch.device, tuple[Tensor, float]] = {}

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies, factor = self._frequencies(positions.device)
        angles = positions[..., None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        if factor == 1.0:
            return angles.cos().to(dtype), angles.sin().to(dtype)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def _frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        parameters = self.config.rope_parameters
        if parameters.get("rope_type", "default") in ("default", "proportional"):
            return _plain_frequencies(parameters, self.config.head_dim, device), 1.0
        if device not in self._scaled:
            self._scaled[device] = _scaled_frequencies(self.config, device)
        return self._scaled[device]


def _plain_frequencies(parameters: dict[str, Any], head_dim: int, device: torch.device) -> Tensor:
    share = float(parameters.get("partial_rotary_factor", 1.0))
    is_proportional = parameters.get("rope_type") == "proportional"
    size = head_dim if is_proportional else int(head_dim * share)
    exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    frequencies = 1.0 / (float(parameters.get("rope_theta", 10000.0)) ** exponents)
    if is_proportional:
        frequencies[int(share * head_dim // 2) :] = 0.0
    return frequencies


def _scaled_frequencies(config: DSparkConfig, device: torch.device) -> tuple[Tensor, float]:
    # some of Transformers' functions make tensors where PyTorch makes them by default
    with torch.device("cpu"):
        frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    return frequencies.to(device), float(factor)


def rotate(states: Tensor, rotary: tuple[Tensor, Tensor], is_interleaved: bool = False) -> Tensor:
    """Apply rotary positions `(B, *, R)` to the first R entries of every head of states `(B, *, H, E)`.

    Entry i turns with entry i + R / 2, or if `is_interleaved` every even entry with the next one.
    """
    cos, sin = rotary[0].unsqueeze(-2), rotary[1].unsqueeze(-2)
    size = cos.shape[-1]
    turned, rest = (states, None) if size == states.shape[-1] else states.split([size, states.shape[-1] - size], -1)
    if is_interleaved:
        even, odd = turned[..., ::2], turned[..., 1::2]
        cos, sin = cos[..., : size // 2], sin[..., : size // 2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if rest is None else torch.cat([turned, rest], dim=-1)
