"""Linear layers that keep their weight as it is stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dspark_hf.modeling.deepseek_v4 import linear
from dspark_hf.modeling.deepseek_v4.formats import dequantize, quantize_fp4, quantize_fp8
from dspark_hf.modeling.deepseek_v4.linear import (
    GroupedLinear,
    QuantizedGroupedLinear,
    QuantizedLinear,
    QuantizedWeight,
    swap_linears,
)
from dspark_hf.modeling.formats.tensors import read_index
from tests.closeness import assert_same_up_to_rounding
from tests.modeling.deepseek_v4.checkpoints import NUM_TOKENS, load, logits

QUANTIZERS = {"fp8": quantize_fp8, "fp4": quantize_fp4}


def _stored(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    return QUANTIZERS[kind](torch.randn(96, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_equals_that_of_the_dequantized_weight(kind, dtype):
    """A kept weight is decoded in another dtype than the activations, or wrongly."""
    weight, scale = _stored(kind)
    states = torch.randn(3, 64, dtype=dtype)
    expected = nn.functional.linear(states, dequantize(weight, scale, dtype))
    actual = QuantizedLinear(weight, scale)(states)
    assert actual.dtype == dtype
    # one sum an entry
    assert_same_up_to_rounding(actual, expected, factor=4)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_grouped_product(kind):
    """The kept output projection mixes its groups."""
    weight, scale = _stored(kind)
    plain = GroupedLinear(64, 96, 3)
    plain.weight = nn.Parameter(dequantize(weight, scale, torch.float32))
    states = torch.randn(2, 3, 64)
    assert_same_up_to_rounding(QuantizedGroupedLinear(weight, scale, 3)(states), plain(states), factor=4)


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("num_groups", [None, 3])
def test_gradients_pass_through(kind, num_groups):
    """An adapter before a kept layer gets no gradient, or the kept weight does, or it is held in floating point."""
    weight, scale = _stored(kind)
    plain = nn.Linear(64, 96, bias=False) if num_groups is None else GroupedLinear(64, 96, num_groups)
    plain.weight = nn.Parameter(dequantize(weight, scale, torch.float32), requires_grad=False)
    kept = QuantizedLinear(weight, scale) if num_groups is None else QuantizedGroupedLinear(weight, scale, num_groups)
    shape = (2, 64) if num_groups is None else (2, num_groups, 64)
    gradients, saved = [], []
    for layer in (kept, plain):
        states = torch.linspace(-1, 1, 2 * 64 * (num_groups or 1)).view(shape).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
            outputs = layer(states)
        outputs.square().sum().backward()
        gradients.append(states.grad)
        if layer is kept:
            assert saved and not any(tensor.dtype == torch.float32 and tensor.numel() == 96 * 64 for tensor in saved)
    assert_same_up_to_rounding(*gradients, factor=16)
    assert kept.weight.grad is None


def test_a_change_of_dtype_leaves_stored_weights():
    """Moving a model to bf16 casts its packed weights to numbers that mean nothing."""
    layer = QuantizedLinear(*_stored("fp8")).to(torch.bfloat16)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.scale.dtype == torch.float8_e8m0fnu


def test_swap_with_names_of_another_place():
    """Layers of a part of a model cannot be found by the names of the whole."""
    module = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 8, bias=False))
    weight, scale = _stored("fp4")
    stored = {"a.0.weight": weight, "a.0.scale": scale, "a.1.weight": torch.zeros(8, 96)}
    swap_linears(module, stored, "a.")
    assert isinstance(module[0], QuantizedLinear)
    assert module[0].weight.is_meta
    assert (module[0].weight.dtype, module[0].weight.shape) == (torch.int8, (96, 32))
    assert type(module[1]) is nn.Linear


def test_swap_refuses_another_size():
    """A checkpoint of another size is taken, and fails at the first product."""
    weight, scale = _stored("fp8")
    with pytest.raises(ValueError, match=r"`0\.weight` must hold \(96, 32\) numbers, got \(96, 64\)"):
        swap_linears(nn.Sequential(nn.Linear(32, 96, bias=False)), {"0.weight": weight, "0.scale": scale})


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_swap_takes_what_is_stored_with_scales(checkpoints, experts):
    """Some stored weights are dequantised at loading, and memory grows by gigabytes."""
    names = {name.removesuffix(".scale") for name in read_index(checkpoints[experts]) if name.endswith(".scale")}
    names = {name for name in names if not name.startswith("mtp.")}
    kept = {name for name, one in load(checkpoints[experts]).model.named_modules() if isinstance(one, QuantizedWeight)}
    assert kept == names


def test_only_chosen_experts_are_dequantized(checkpoints, monkeypatch):
    """Every token pays for decoding all experts."""
    model = load(checkpoints["fp4"])
    config = model.config
    seen = []
    monkeypatch.setattr(linear, "dequantize", lambda *args: seen.append(args[0].dtype) or dequantize(*args))
    with torch.no_grad():
        model(torch.tensor([[7]]))
    # three matrices an expert; only routed experts are in FP4
    assert seen.count(torch.int8) == 3 * config.num_experts_per_tok * config.num_hidden_layers
    assert config.num_experts_per_tok < config.n_routed_experts
    seen.clear()
    logits(model)
    most = min(config.n_routed_experts, NUM_TOKENS * config.num_experts_per_tok)
    assert seen.count(torch.int8) <= 3 * most * config.num_hidden_layers
