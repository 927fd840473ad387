"""Linear layers of DeepSeek-V4: grouped ones, and ones that keep their weight as it is stored.

g groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import logging

from dspark_hf.modeling.deepseek_v4.formats import dequantize

# dtypes that packed FP4 is stored in, and all that come with scales
PACKED = (torch.int8, torch.uint8)
QUANTIZED = (torch.float8_e4m3fn, *PACKED)
# seconds after which a bar says how far loading is
BAR_DELAY = 1.0


class _Stored(Protocol):
    """What is known of a tensor without reading it."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> Sequence[int]: ...


class GroupedLinear(nn.Module):
    """A block-diagonal product: group j of the input meets the j-th share of the weight's rows.

    No `nn.Linear`, which tools that adapt or quantise layers would take it for: its outputs are fewer than its rows.
    """

    def __init__(self, in_features: int, out_features: int, num_groups: int):
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, input: Tensor) -> Tensor:
        """Return `(*, g, out_features / g)` for inputs `(*, g, in_features)`."""
        return grouped_product(input, self.weight, self.num_groups)


def grouped_product(states: Tensor, weight: Tensor, num_groups: int) -> Tensor:
    """Return `(*, g, o / g)` for states `(*, g, i)` and a weight `(o, i)`."""
    return torch.einsum("...gi,goi->...go", states, weight.unflatten(0, (num_groups, -1)))


class QuantizedWeight(nn.Module):
    """A layer whose weight stays in FP8 or packed FP4 and becomes floating point for the time of a product.

    Args:
        weight: as stored; scales in `scale`. Both may be on the meta device until they are loaded.
        scale: as stored.
    """

    # of `nn.Linear` too, for whose sake it is a plain tensor to mypy
    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor):
        # not that of `nn.Linear`, which would make a weight in floating point
        nn.Module.__init__(self)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `(o, i)` in `dtype`."""
        return dequantize(self.weight, self.scale, dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # a change of the model's dtype leaves stored weights as they are
        def keep_format(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(keep_format, recurse)


class QuantizedLinear(QuantizedWeight, nn.Linear):
    """A linear layer with a stored weight; an `nn.Linear`, so that adapters can be trained beside it."""

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__(weight, scale)
        self.out_features, self.in_features = dequantized_shape(weight.dtype, weight.shape)
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with `input`, in its dtype."""
        return _Product.apply(input, self.weight, self.scale, None)


class QuantizedGroupedLinear(QuantizedWeight):
    """A `GroupedLinear` with a stored weight."""

    def __init__(self, weight: Tensor, scale: Tensor, num_groups: int):
        super().__init__(weight, scale)
        self.num_groups = num_groups

    def forward(self, input: Tensor) -> Tensor:
        """Return `(*, g, o / g)` for inputs `(*, g, i)`, in their dtype."""
        return _Product.apply(input, self.weight, self.scale, self.num_groups)


class _Product(torch.autograd.Function):
    """A product with a stored weight; for the gradient it is decoded once more, instead of kept in floating point."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, scale: Tensor, num_groups: int | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.num_groups, ctx.dtype = num_groups, states.dtype
        decoded = dequantize(weight, scale, states.dtype)
        if num_groups is None:
            return nn.functional.linear(states, decoded)
        return grouped_product(states, decoded, num_groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # as many as `forward` has arguments
        weight, scale = ctx.saved_tensors
        decoded = dequantize(weight, scale, gradient.dtype)
        if ctx.num_groups is None:
            passed = gradient @ decoded
        else:
            passed = torch.einsum("...go,goi->...gi", gradient, decoded.unflatten(0, (ctx.num_groups, -1)))
        return passed.to(ctx.dtype), None, None, None


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
    # a full-size model has 33,000 of them
    for name, child in logging.tqdm(list(module.named_modules()), desc="Preparing layers", delay=BAR_DELAY):
        weight, scale = stored.get(f"{prefix}{name}.weight"), stored.get(f"{prefix}{name}.scale")
        if (
            not isinstance(child, (nn.Linear, GroupedLinear))
            or weight is None
            or scale is None
            or weight.dtype not in QUANTIZED
        ):
            continue
        shape = dequantized_shape(weight.dtype, weight.shape)
        if shape != tuple(child.weight.shape):
            raise ValueError(
                f"`{prefix}{name}.weight` must hold {tuple(child.weight.shape)} numbers, got {shape}. Use the "
                "configuration that belongs to the checkpoint."
            )
        parts = [torch.empty(tuple(part.shape), dtype=part.dtype, device="meta") for part in (weight, scale)]
        swapped: QuantizedWeight = (
            QuantizedGroupedLinear(parts[0], parts[1], child.num_groups)
            if isinstance(child, GroupedLinear)
            else QuantizedLinear(parts[0], parts[1])
        )
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, swapped)


def dequantized_shape(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that a stored weight has as floating point: two numbers of packed FP4 are in a byte."""
    return (*shape[:-1], 2 * shape[-1]) if dtype in PACKED else tuple(shape)
