"""The number formats of released weights: FP8 in blocks, packed FP4, power-of-two scales (E8M0).

What a format holds survives decoding and encoding bit for bit. o rows, i columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FP8_BLOCK = 128
FP4_GROUP = 32
# largest values of e4m3 and e2m1
_FP8_LARGEST = 448.0
_FP4_LARGEST = 6.0
# by code: sign in bit 3, then the magnitude
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# between neighbours; where the even one of them is the larger, the middle itself goes up
_FP4_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_E8M0_BIAS = 127
# dtypes that scales are stored in; bytes are E8M0
SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu, torch.uint8)
# fp32 scales keep this many bits, so that 4 bits of a value times a scale are exact in fp32
_SCALE_BITS = 20


def scale_values(scale: Tensor) -> Tensor:
    """Return scales in fp32, whatever their shape.

    Takes fp32, or E8M0 as `float8_e8m0fnu` or its bytes, `uint8`: 2^(byte - 127), where 255 is NaN.

    Raises:
        ValueError: if `scale` has another dtype.

    Example:

        >>> import torch
        >>> from dspark_hf.modeling.deepseek_v4.formats import scale_values
        >>> scale_values(torch.tensor([126, 127, 130], dtype=torch.uint8))
        tensor([0.5000, 1.0000, 8.0000])
    """
    if scale.dtype == torch.float32:
        return scale
    if scale.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"`scale` must be float32, float8_e8m0fnu or uint8, got {scale.dtype}. Read it from a released checkpoint."
        )
    # few kernels know E8M0, and powers are not exact everywhere: put the bytes where fp32 has its exponent
    exponents = scale.view(torch.uint8).int()
    bits = exponents << 23
    bits = torch.where(exponents == 0, 1 << 22, bits)
    bits = torch.where(exponents == 255, 0x7FC00000, bits)
    return bits.int().view(torch.float32)


def scale_shape(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the scales that belong to a stored weight of this dtype, FP8 or packed FP4, and shape."""
    rows, columns = shape
    if dtype == torch.float8_e4m3fn:
        return _num_blocks(rows), _num_blocks(columns)
    return rows, columns * 2 // FP4_GROUP


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a stored weight in `dtype`: packed FP4 `(o, i / 2)` or FP8 `(o, i)`, told apart by its own dtype.

    Raises:
        ValueError: if it is in neither format, or `scale` does not fit it.
    """
    if weight.dtype in (torch.int8, torch.uint8):
        return dequantize_fp4(weight, scale, dtype)
    if weight.dtype == torch.float8_e4m3fn:
        return dequantize_fp8(weight, scale, dtype)
    raise ValueError(
        f"`weight` must be FP8 (float8_e4m3fn) or packed FP4 (int8), got {weight.dtype}. Read it from a released "
        "checkpoint."
    )


def dequantize_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an FP8 weight `(o, i)` with one scale a block, `(ceil(o / 128), ceil(i / 128))`, in `dtype`.

    Raises:
        ValueError: if `scale` has another shape.
    """
    _check_shape(scale, scale_shape(weight.dtype, weight.shape))
    return (weight.float() * _spread(scale_values(scale), weight.shape)).to(dtype)


def quantize_fp8(weight: Tensor, *, scale_dtype: torch.dtype = torch.float8_e8m0fnu) -> tuple[Tensor, Tensor]:
    """Return a weight `(o, i)` in FP8 `(o, i)` and its scales `(ceil(o / 128), ceil(i / 128))`.

    A scale is the block's largest magnitude / 448, rounded up: to a power of two for `float8_e8m0fnu`, to 20 bits for
    `float32`. Weights that an E8M0 scale belongs to come back exactly, also through bf16; those with an fp32 scale do
    if this function made it and they were decoded to fp32.

    Raises:
        ValueError: if `scale_dtype` is neither of the two.

    Example:

        >>> import torch
        >>> from dspark_hf.modeling.deepseek_v4.formats import dequantize, quantize_fp8
        >>> weight, scale = quantize_fp8(torch.tensor([[1.0, -3.5, 0.25]]))
        >>> dequantize(weight, scale, torch.bfloat16)
        tensor([[ 1.0000, -3.5000,  0.2500]], dtype=torch.bfloat16)
    """
    rows, columns = (_num_blocks(size) for size in weight.shape)
    padded = weight.new_zeros(rows * FP8_BLOCK, columns * FP8_BLOCK, dtype=torch.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    maxima = padded.view(rows, FP8_BLOCK, columns, FP8_BLOCK).abs().amax((1, 3))
    scale = _make_scales(maxima / _FP8_LARGEST, scale_dtype)
    scaled = weight.float() / _spread(scale_values(scale), weight.shape)
    return scaled.clamp(-_FP8_LARGEST, _FP8_LARGEST).to(torch.float8_e4m3fn), scale


def dequantize_fp4(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a packed FP4 weight `(o, i / 2)` with one scale for 32 columns, `(o, i / 32)`, as `(o, i)` in `dtype`.

    The low half of a byte is the even column.

    Raises:
        ValueError: if `scale` has another shape.
    """
    _check_shape(scale, scale_shape(weight.dtype, weight.shape))
    groups = weight.view(torch.uint8).unflatten(1, (-1, FP4_GROUP // 2))
    return decode_fp4(groups, scale).flatten(1).to(dtype)


def quantize_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight `(o, i)` as packed FP4 `(o, i / 2)`, int8, with E8M0 scales `(o, i / 32)`.

    A scale is the group's largest magnitude / 6, rounded up to a power of two.

    Raises:
        ValueError: if i is no multiple of 32.
    """
    if weight.shape[1] % FP4_GROUP:
        raise ValueError(
            f"`weight` must have a multiple of {FP4_GROUP} columns, got {weight.shape[1]}. Store it in FP8 or bf16."
        )
    packed, scale = encode_fp4(weight.unflatten(1, (-1, FP4_GROUP)))
    return packed.flatten(1).view(torch.int8), scale


def encode_fp4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return groups of numbers `(*, g)` as packed FP4 `(*, g / 2)`, uint8, and their E8M0 scales `(*)`.

    A scale is the group's largest magnitude / 6, rounded up to a power of two. Numbers go to the nearest value,
    halfway to the even code. The low half of a byte is the even column.

    Example:

        >>> import torch
        >>> from dspark_hf.modeling.deepseek_v4.formats import decode_fp4, encode_fp4
        >>> decode_fp4(*encode_fp4(torch.tensor([[0.9, -3.3, 0.3, 5.9]])))
        tensor([[ 1.0000, -3.0000,  0.5000,  6.0000]])
    """
    groups = groups.float()
    scale = _make_scales(groups.abs().amax(-1) / _FP4_LARGEST, torch.float8_e8m0fnu)
    scaled = groups / scale_values(scale)[..., None]
    middles = torch.tensor(_FP4_MIDDLES, device=groups.device)
    middles[1::2] = middles[1::2].nextafter(torch.zeros((), device=groups.device))
    codes = torch.bucketize(scaled.abs(), middles, out_int32=True) + 8 * scaled.signbit().int()
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8), scale


def decode_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Return groups of packed FP4 `(*, g / 2)`, uint8, with a scale each, `(*)`, as fp32 `(*, g)`."""
    table = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)], device=packed.device)
    # by byte: both its values, looked up as one number, which takes a third of the time
    pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], dim=-1).view(torch.int64).flatten()
    values = pairs.index_select(0, packed.flatten().int()).view(torch.float32)
    return values.view(*packed.shape[:-1], 2 * packed.shape[-1]) * scale_values(scale)[..., None]


def _make_scales(wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales of at least `wanted`, as they are stored in `dtype`."""
    # zeros are zeros with any scale
    wanted = torch.where(wanted > 0, wanted, torch.ones_like(wanted))
    mantissa, exponent = torch.frexp(wanted)
    if dtype == torch.float32:
        # a subnormal has fewer bits than are kept
        kept = torch.ldexp((mantissa * 2**_SCALE_BITS).ceil(), exponent - _SCALE_BITS)
        return torch.where(wanted < torch.finfo(torch.float32).tiny, wanted, kept)
    if dtype != torch.float8_e8m0fnu:
        raise ValueError(f"`scale_dtype` must be float8_e8m0fnu or float32, got {dtype}. Choose one of them.")
    # frexp's mantissa is at least a half, and a half where `wanted` is a power of two
    exponent = torch.where(mantissa > 0.5, exponent, exponent - 1)
    return (exponent + _E8M0_BIAS).clamp(0, 254).to(torch.uint8).view(torch.float8_e8m0fnu)


def _num_blocks(size: int) -> int:
    return -(-size // FP8_BLOCK)


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Return the scale of every element of a weight of this shape."""
    rows = scale.repeat_interleave(FP8_BLOCK, dim=0)[: shape[0]]
    return rows.repeat_interleave(FP8_BLOCK, dim=1)[:, : shape[1]]


def _check_shape(scale: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(scale.shape) != shape:
        raise ValueError(
            f"`scale` must have the shape {shape} for this weight, got {tuple(scale.shape)}. Take the one that is "
            "stored beside it."
        )
