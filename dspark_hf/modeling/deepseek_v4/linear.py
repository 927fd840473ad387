"""Linear layers of DeepSeek-V4: grouped ones, and ones that keep their weight as it is stored.

g groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dspark_hf.modeling.deepseek_v4.formats import dequantize

# dtypes that packed FP4 is stored in, and all that come with scales
PACKED = (torch.int8, torch.uint8)
QUANTIZED = (torch.float8_e4m3fn, *PACKED)


class _Stored(Protocol):
    """What is known of a tensor without reading it."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> Sequence[int]: ...


class GroupedLinear(nn.Linear):
    """A block-diagonal product: group j of the input meets the j-th share of the weight's rows."""

    def __init__(self, in_features: int, out_features: int, num_groups: int):
        super().__init__(in_features, out_features, bias=False)
        self.num_groups = num_groups

    def forward(self, input: Tensor) -> Tensor:
        """Return `(*, g, out_features / g)` for inputs `(*, g, in_features)`."""
        return grouped_product(input, self.weight, self.num_groups)


def grouped_product(states: Tensor, weight: Tensor, num_groups: int) -> Tensor:
    """Return `(*, g, o / g)` for states `(*, g, i)` and a weight `(o, i)`."""
    return torch.einsum("...gi,goi->...go", states, weight.unflatten(0, (num_groups, -1)))


class QuantizedLinear(nn.Module):
    """A linear layer whose weight stays in FP8 or packed FP4 and becomes floating point for the time of a product.

    Args:
        weight: as stored; scales in `scale`. Both may be on the meta device until they are loaded.
        scale: as stored.
        num_groups: groups of a block-diagonal product, or None for an ordinary one.
    """

    def __init__(self, weight: Tensor, scale: Tensor, num_groups: int | None = None):
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `(o, i)` in `dtype`."""
        return dequantize(self.weight, self.scale, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with `input`, in its dtype."""
        weight = self.dequantize(input.dtype)
        if self.num_groups is not None:
            return grouped_product(input, weight, self.num_groups)
        return nn.functional.linear(input, weight)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # a change of the model's dtype leaves stored weights as they are
        def keep_format(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keep_format, recurse)


def swap_linears(module: nn.Module, stored: Mapping[str, _Stored], prefix: str = "") -> None:
    """Replace the linear layers whose weights are stored in FP8 or FP4, `NAME.weight` with `NAME.scale`.

    The new parameters are on the meta device, with the dtypes and shapes that are stored.

    Args:
        module: any module with linear layers.
        stored: what is known of the tensors, by name.
        prefix: what the names in `stored` begin with, before the module's own.

    Raises:
        ValueError: if a stored weight has another size than its layer.
    """
    for name, child in list(module.named_modules()):
        weight, scale = stored.get(f"{prefix}{name}.weight"), stored.get(f"{prefix}{name}.scale")
        if not isinstance(child, nn.Linear) or weight is None or scale is None or weight.dtype not in QUANTIZED:
            continue
        shape = dequantized_shape(weight.dtype, weight.shape)
        if shape != tuple(child.weight.shape):
            raise ValueError(
                f"`{prefix}{name}.weight` must hold {tuple(child.weight.shape)} numbers, got {shape}. Use the "
                "configuration that belongs to the checkpoint."
            )
        parts = [torch.empty(tuple(part.shape), dtype=part.dtype, device="meta") for part in (weight, scale)]
        groups = child.num_groups if isinstance(child, GroupedLinear) else None
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, QuantizedLinear(parts[0], parts[1], groups))


def dequantized_shape(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that a stored weight has as floating point: two numbers of packed FP4 are in a byte."""
    return (*shape[:-1], 2 * shape[-1]) if dtype in PACKED else tuple(shape)
