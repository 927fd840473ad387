"""Linear layers of DeepSeek-V4.

g groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupedLinear(nn.Linear):
    """A block-diagonal product: group j of the input meets the j-th share of the weight's rows."""

    def __init__(self, in_features: int, out_features: int, num_groups: int):
        super().__init__(in_features, out_features, bias=False)
        self.num_groups = num_groups

    def forward(self, input: Tensor) -> Tensor:
        """Return `(*, g, out_features / g)` for inputs `(*, g, in_features)`."""
        weight = self.weight.unflatten(0, (self.num_groups, -1))
        return torch.einsum("...gi,goi->...go", input, weight)
