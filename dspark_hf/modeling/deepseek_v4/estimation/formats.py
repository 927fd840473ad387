"""In what formats weights and caches are stored, and what that takes."""

from __future__ import annotations

from enum import Enum


class WeightFormat(str, Enum):
    """How the matrices that the release quantises are stored; everything else stays as released, but in `fp32`."""

    released = "released"
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


class CacheFormat(str, Enum):
    """How the entries of the KV cache are stored."""

    released = "released"
    bf16 = "bf16"
    fp32 = "fp32"


class Arithmetic(str, Enum):
    """What a product is computed in."""

    fp4 = "fp4"
    fp8 = "fp8"
    bf16 = "bf16"


# time of one operation in FP8 operations, from the peak rates of hardware that has all three; what the released code
# computes in fp32 is taken as bf16
FP8_EQUIVALENT = {Arithmetic.fp4: 0.5, Arithmetic.fp8: 1.0, Arithmetic.bf16: 2.0}

ELEMENT_BYTES = {"int64": 8, "fp32": 4, "bf16": 2}

# blocks that share a scale, in elements
FP8_BLOCK = 128
FP4_GROUP = 32
INT4_GROUP = 64


def stored_bytes(storage: str, rows: int, columns: int, fp8_scale_bytes: int) -> int:
    """Return the bytes of one matrix, scales included.

    Args:
        storage: `"int64"`, `"fp32"`, `"bf16"`, `"fp8"` (a scale per 128 x 128 block), `"fp4"` (two elements a byte
            and a one-byte scale per 32 of a row), `"int8"` (an fp32 scale per row) or `"int4"` (two elements a byte
            and an fp32 scale per 64).
        rows: outputs.
        columns: inputs.
        fp8_scale_bytes: bytes of one scale of `"fp8"`.
    """
    elements = rows * columns
    if storage == "fp8":
        return elements + _blocks(rows, FP8_BLOCK) * _blocks(columns, FP8_BLOCK) * fp8_scale_bytes
    if storage == "fp4":
        return _blocks(elements, 2) + rows * _blocks(columns, FP4_GROUP)
    if storage == "int8":
        return elements + rows * ELEMENT_BYTES["fp32"]
    if storage == "int4":
        return _blocks(elements, 2) + _blocks(elements, INT4_GROUP) * ELEMENT_BYTES["fp32"]
    return elements * ELEMENT_BYTES[storage]


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
