"""What a call over a static cache fixes from its start, for the target as for the drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FixedSize:
    """Shapes that stay, and how passes of these shapes are compiled.

    Args:
        num_slots: room of a row, in tokens.
        widths: how many tokens a row a verify pass may have.
        compile_options: keywords of `torch.compile`, or None if nothing is compiled.
    """

    num_slots: int
    widths: tuple[int, ...]
    compile_options: dict[str, Any] | None


def fix_shapes(tensors: Sequence[Tensor]) -> None:
    """Let every shape but the number of rows, which comes first, be a constant of the graph that is compiled next.

    A graph of any width would be slower, and there are few; of a tensor without rows, all is constant.
    """
    for tensor in tensors:
        for axis in range(min(1, tensor.ndim - 1), tensor.ndim):
            torch._dynamo.mark_static(tensor, axis)
