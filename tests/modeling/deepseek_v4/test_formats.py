"""FP8, FP4 and their scales, decoded and encoded exactly."""

from __future__ import annotations

import math

import pytest
import torch

from dspark_hf.modeling.deepseek_v4.formats import (
    dequantize,
    dequantize_fp4,
    dequantize_fp8,
    quantize_fp4,
    quantize_fp8,
    scale_values,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return what tells also -0 from 0."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def _random_fp8(rows: int, columns: int) -> torch.Tensor:
    values = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    # 127 and 255 are NaN
    return torch.where(values % 128 == 127, 0, values).to(torch.uint8).view(torch.float8_e4m3fn)


def test_every_power_of_two_scale():
    """All weights of an expert are off by a factor."""
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = torch.tensor([math.ldexp(1.0, code - 127) for code in range(255)])
    for scale in (codes, codes.view(torch.float8_e8m0fnu)):
        values = scale_values(scale)
        assert values.dtype == torch.float32
        assert torch.equal(values[:255], wanted)
        assert values[255].isnan()
    stored = torch.rand(3, 2)
    assert torch.equal(scale_values(stored), stored)


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (5, 3)])
def test_fp8_element_by_element(shape, scale_dtype):
    """A block takes its neighbour's scale, above all at ragged edges."""
    weight = _random_fp8(*shape)
    size = (-(-shape[0] // 128), -(-shape[1] // 128))
    scale = torch.rand(size) if scale_dtype == torch.float32 else torch.randint(110, 140, size, dtype=torch.uint8)
    if scale_dtype == torch.float8_e8m0fnu:
        scale = scale.view(scale_dtype)
    decoded = dequantize_fp8(weight, scale, torch.float32)
    factors = scale_values(scale)
    for row in range(0, shape[0], 3):
        for column in range(0, shape[1], 7):
            assert decoded[row, column] == weight[row, column].float() * factors[row // 128, column // 128]
    assert torch.equal(dequantize(weight, scale, torch.bfloat16), decoded.to(torch.bfloat16))


def test_fp4_low_half_is_the_even_column():
    """Neighbouring columns are swapped, or signs lost."""
    weight = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(16, 16)
    scale = torch.randint(120, 130, (16, 1), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    decoded = dequantize_fp4(weight, scale, torch.float32)
    assert decoded.shape == (16, 32)
    for code in range(256):
        row, column = code // 16, code % 16
        for place, half in ((2 * column, code & 15), (2 * column + 1, code >> 4)):
            wanted = E2M1[half & 7] * (-1.0 if half & 8 else 1.0) * float(scale_values(scale)[row, 0])
            assert float(decoded[row, place]) == wanted
            assert math.copysign(1, float(decoded[row, place])) == math.copysign(1, wanted)
    assert torch.equal(dequantize(weight, scale, torch.bfloat16), decoded.to(torch.bfloat16))
    stored, _ = quantize_fp4(torch.tensor([[6.0, -0.5] + [0.0] * 30]))
    assert stored.view(torch.uint8)[0, 0] == 0x97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 128), (130, 257)])
def test_released_fp8_survives(shape, dtype):
    """A checkpoint that is loaded and saved is not the same model any more."""
    size = (-(-shape[0] // 128), -(-shape[1] // 128))
    # blocks that do not use their whole range, too
    weight = (_random_fp8(*shape).float() * torch.rand(shape).gt(0.5)).to(torch.float8_e4m3fn)
    weight[:1] = (weight[:1].float() / 64).to(torch.float8_e4m3fn)
    scale = torch.randint(100, 130, size, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    decoded = dequantize(weight, scale, dtype)
    again = dequantize(*quantize_fp8(decoded), dtype)
    assert torch.equal(_bits(again), _bits(decoded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_fp4_survives(dtype):
    """A checkpoint that is loaded and saved is not the same model any more."""
    weight = torch.randint(0, 256, (64, 64), dtype=torch.uint8).view(torch.int8)
    # groups whose largest value is small, and groups of zeros
    weight[:8] &= 0x11
    weight[8:16] = 0
    scale = torch.randint(100, 130, (64, 4), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    decoded = dequantize(weight, scale, dtype)
    again = dequantize(*quantize_fp4(decoded), dtype)
    assert torch.equal(_bits(again), _bits(decoded))


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_own_fp32_scales_survive(factor):
    """Weights drift with every save."""
    for _ in range(20):
        weight = torch.randn(140, 30) * torch.randn(140, 1).exp() * factor
        first = dequantize(*quantize_fp8(weight, scale_dtype=torch.float32), torch.float32)
        again = dequantize(*quantize_fp8(first, scale_dtype=torch.float32), torch.float32)
        assert torch.equal(_bits(again), _bits(first))


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32])
def test_fp8_error_is_half_a_step(scale_dtype):
    """Quantised weights are further from the original than they need to be."""
    weight = torch.randn(200, 300)
    stored, scale = quantize_fp8(weight, scale_dtype=scale_dtype)
    assert stored.dtype == torch.float8_e4m3fn
    assert scale.dtype == scale_dtype
    assert scale.shape == (2, 3)
    values = scale_values(scale)
    assert values[0, 0] * 448 >= weight[:128, :128].abs().max()
    # 3 bits behind the first one; below 2^-6 steps of 2^-9
    step = torch.maximum(weight.abs() * 2**-4, values.max() * 2**-10)
    assert ((dequantize(stored, scale, torch.float32) - weight).abs() <= step * (1 + 1e-6)).all()


def test_fp4_takes_the_nearest_value():
    """Quantised experts are further from the original than they need to be."""
    # the largest value makes the scale 1
    weight = torch.cat([torch.full((1, 1), 6.0), torch.linspace(-6, 6, 31)[None]], dim=1)
    stored, scale = quantize_fp4(weight)
    assert (stored.dtype, stored.shape) == (torch.int8, (1, 16))
    assert (scale.dtype, scale.shape) == (torch.float8_e8m0fnu, (1, 1))
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    nearest = (weight[..., None] - values).abs().amin(-1)
    assert torch.equal((dequantize(stored, scale, torch.float32) - weight).abs(), nearest)


def test_fp4_middles_go_to_even():
    """Values between two neighbours are all rounded one way, which shifts the mean."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight = torch.zeros(1, 32)
    weight[0, 0] = 6
    weight[0, 1:8], weight[0, 8:15] = middles, -middles
    decoded = dequantize(*quantize_fp4(weight), torch.float32)
    wanted = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(decoded[0, 1:8], wanted)
    assert torch.equal(decoded[0, 8:15], -wanted)


def test_extremes():
    """Zeros, or numbers at the ends of the range, become NaN."""
    for weight in (torch.zeros(2, 32), torch.full((2, 32), 1e-44), torch.full((2, 32), 2e38)):
        for stored, scale in (
            quantize_fp4(weight),
            quantize_fp8(weight),
            quantize_fp8(weight, scale_dtype=torch.float32),
        ):
            decoded = dequantize(stored, scale, torch.float32)
            assert torch.allclose(decoded, weight, rtol=0.2, atol=1e-38)


def test_mistakes_are_told():
    """Weights are decoded with a scale that belongs to others."""
    weight, scale = quantize_fp8(torch.randn(130, 20))
    with pytest.raises(ValueError, match=r"`scale` must have the shape \(2, 1\) for this weight, got \(1, 2\)"):
        dequantize(weight, scale.view(torch.uint8).T, torch.float32)
    with pytest.raises(ValueError, match="`scale` must be float32, float8_e8m0fnu or uint8, got torch.int8"):
        dequantize(weight, scale.view(torch.int8), torch.float32)
    with pytest.raises(ValueError, match="`weight` must be FP8"):
        dequantize(weight.float(), scale, torch.float32)
    with pytest.raises(ValueError, match="`weight` must have a multiple of 32 columns, got 20"):
        quantize_fp4(torch.randn(4, 20))
    with pytest.raises(ValueError, match="`scale_dtype` must be float8_e8m0fnu or float32"):
        quantize_fp8(torch.randn(4, 20), scale_dtype=torch.float16)
