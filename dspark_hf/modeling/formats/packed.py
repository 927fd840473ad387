"""Weights stored in fewer bits, as compressed-tensors and its kin write them: FP8, and integers of 2, 4 or 8 bits.

They become the plain weights that they stand for; the drafter computes in those. Scales of activations are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dspark_hf.modeling.formats.reading import Shapes, Unreadable

SIZES = ".weight_shape"
_PACKED = ".weight_packed"
_WEIGHT = ".weight"
_SCALES = (".weight_scale", ".weight_scale_inv")
_BESIDE = (*_SCALES, SIZES, ".weight_zero_point", ".weight_g_idx", ".input_scale")
# the bits that lie in words of 32 without a rest
_BITS = (2, 4, 8)
_SMALL = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_SECTIONS = ("quantization_config", "compression_config")


def are_packed(names: Any) -> bool:
    """Return whether tensors of these names are weights in fewer bits."""
    return any(name.endswith((_PACKED, *_SCALES)) for name in names)


def plain_name(name: str) -> str:
    """Return the name of the plain weight that a stored tensor stands for; others keep theirs."""
    return name.removesuffix(_PACKED) + _WEIGHT if name.endswith(_PACKED) else name


def plain_shapes(shapes: Shapes, sizes: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that tensors of these shapes stand for.

    Args:
        shapes: of all tensors, as stored.
        sizes: the tensors `*.weight_shape`, which say what was packed.
    """
    plain = {name: shape for name, shape in shapes.items() if not name.endswith((*_BESIDE, _PACKED))}
    for name in shapes:
        if name.endswith(_PACKED):
            module = name.removesuffix(_PACKED)
            plain[module + _WEIGHT] = _size(module, sizes)
    return plain


def unpack(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return tensors with plain weights in the place of those in fewer bits, in the dtype of their scales.

    Args:
        tensors: of a drafter, as stored.
        fields: of its `config.json`, which say how many weights share a scale.

    Raises:
        ValueError: if a weight is in other bits, lacks its scale, or the two do not belong together.
    """
    plain = {name: x for name, x in tensors.items() if not name.endswith((*_BESIDE, _PACKED))}
    blocks = _blocks(fields)
    for name in [name for name in tensors if name.endswith(_PACKED)]:
        module = name.removesuffix(_PACKED)
        plain[module + _WEIGHT] = _scaled(_integers(module, tensors), module, tensors, blocks)
    for name in [name for name, x in plain.items() if x.dtype in _SMALL]:
        plain[name] = _scaled(plain[name], name.removesuffix(_WEIGHT), tensors, blocks)
    return plain


def _size(module: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    size = tensors.get(module + SIZES)
    if size is None or size.numel() != 2:
        raise _unreadable("say the sizes of its packed weights", f"none in '{module}{SIZES}'")
    return int(size[0]), int(size[1])


def _integers(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the integers `(out, in)` that a module's packed words hold."""
    packed, columns = tensors[module + _PACKED], _size(module, tensors)[1]
    return _words(packed, _bits(module, tensors))[:, :columns]


def _bits(module: str, tensors: Mapping[str, Tensor]) -> int:
    packed = tensors[module + _PACKED]
    rows, columns = _size(module, tensors)
    # words of a row are filled up: exact for rows of at least a word
    bits = 32 * packed.shape[-1] // max(columns, 1)
    if packed.dtype != torch.int32 or packed.ndim != 2 or len(packed) != rows or bits not in _BITS:
        raise _unreadable(
            f"pack weights into integers of {', '.join(map(str, _BITS))} bits",
            f"'{module}{_PACKED}' of {packed.dtype} {tuple(packed.shape)} for {rows} x {columns} weights",
        )
    return bits


def _zero_point(module: str, tensors: Mapping[str, Tensor], scale: Tensor) -> Tensor | None:
    zero = tensors.get(f"{module}.weight_zero_point")
    if zero is None:
        return None
    if module + _PACKED in tensors and zero.dtype == torch.int32:
        # packed down the rows
        zero = _words(zero.T, _bits(module, tensors))[:, : len(scale)].T
    return zero.reshape(scale.shape)


def _words(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2) - (1 << (bits - 1))


def _scaled(values: Tensor, module: str, tensors: Mapping[str, Tensor], blocks: list[tuple[int, int]]) -> Tensor:
    scale = next((tensors[module + suffix] for suffix in _SCALES if module + suffix in tensors), None)
    if scale is None or not scale.is_floating_point():
        raise _unreadable("hold a scale for every weight in fewer bits", f"'{module}{_WEIGHT}' without")
    zero = _zero_point(module, tensors, scale)
    values = values.to(scale.dtype)
    if scale.numel() == 1:
        return (values if zero is None else values - zero.reshape(())) * scale.reshape(())
    if scale.ndim == 1:
        scale, zero = scale[:, None], None if zero is None else zero[:, None]
    rows, columns = values.shape
    for height, width in [(1, columns), *blocks]:
        if tuple(scale.shape) == (-(-rows // height), -(-columns // width)):
            of_row, of_column = torch.arange(rows) // height, _columns(module, tensors, columns, width)
            values = values if zero is None else values - zero[of_row][:, of_column].to(values.dtype)
            return values * scale[of_row][:, of_column]
    raise _unreadable(
        "share its scales as its configuration says",
        f"scales {tuple(scale.shape)} for '{module}{_WEIGHT}' of {rows} x {columns}",
    )


def _columns(module: str, tensors: Mapping[str, Tensor], columns: int, width: int) -> Tensor:
    """Return the group of every column; some quantisers reorder them."""
    index = tensors.get(f"{module}.weight_g_idx")
    return torch.arange(columns) // width if index is None or int(index.min()) < 0 else index.long()


def _blocks(fields: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the rows and columns that share a scale, as a configuration names them; there may be several kinds."""
    section: Mapping[str, Any] = next((fields[name] for name in _SECTIONS if isinstance(fields.get(name), dict)), {})
    found = [section.get("weight_block_size")]
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            found += [weights.get("block_structure"), [1, weights.get("group_size")]]
    pairs = [one for one in found if isinstance(one, (list, tuple)) and len(one) == 2]
    return [(int(a), int(b)) for a, b in pairs if isinstance(a, int) and isinstance(b, int) and a > 0 and b > 0]


def _unreadable(rule: str, found: str) -> Unreadable:
    return Unreadable(rule, f"a drafter in fewer bits with {found}")
