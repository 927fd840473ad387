"""Stored weights of DeepSeek-V4: number formats, layers that keep them, a tiny checkpoint as it is released."""

from __future__ import annotations

import pytest
import torch

from dspark_hf import DeepseekV4DSparkConfig, DeepseekV4DSparkForCausalLM
from dspark_hf.modeling.deepseek_v4.formats import dequantize, quantize_fp4, quantize_fp8
from dspark_hf.modeling.deepseek_v4.linear import QuantizedLinear, swap_linears
from dspark_hf.modeling.deepseek_v4.reading import iterate_tensors, read_index
from dspark_hf.modeling.deepseek_v4.tiny import write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the folder of a tiny checkpoint with FP4 experts."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder)
    return folder


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32])
def test_fp8_comes_back(scale_dtype):
    """A weight read, stored and read again differs."""
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    once = dequantize(*quantize_fp8(weight, scale_dtype=scale_dtype), torch.float32)
    assert torch.equal(dequantize(*quantize_fp8(once, scale_dtype=scale_dtype), torch.float32), once)
    # half a step of three mantissa bits at the largest value, doubled by a scale that is rounded up
    assert (weight - once).abs().max() <= weight.abs().max() / 16


def test_fp4_comes_back():
    """A packed weight read, stored and read again differs, or its columns are swapped."""
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([6.0, -0.5, 3.0])
    stored, scale = quantize_fp4(weight)
    assert stored.dtype == torch.int8
    assert stored.view(torch.uint8)[0, 0].item() == 0x97
    assert torch.equal(dequantize(stored, scale, torch.float32), weight)
    random = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    once = dequantize(*quantize_fp4(random), torch.float32)
    assert torch.equal(dequantize(*quantize_fp4(once), torch.float32), once)


def test_a_change_of_dtype_leaves_stored_weights(checkpoint):
    """Moving a model to bf16 casts its packed weights to numbers that mean nothing."""
    weight, scale = quantize_fp8(torch.randn(128, 256))
    layer = QuantizedLinear(weight, scale).to(torch.bfloat16)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.scale.dtype == torch.float8_e8m0fnu


def _load(folder, *, is_kept):
    config = DeepseekV4DSparkConfig.from_pretrained(folder)
    model = DeepseekV4DSparkForCausalLM(config).eval()
    infos = {name: info for name, info in read_index(folder).items() if not name.startswith("mtp.")}
    ours = {name if name.startswith("head.") else f"model.{name}": info for name, info in infos.items()}
    tensors = dict(iterate_tensors(infos, infos))
    tensors = {name if name.startswith("head.") else f"model.{name}": value for name, value in tensors.items()}
    if is_kept:
        swap_linears(model, ours)
    else:
        scales = [name for name in tensors if name.endswith(".scale")]
        for name in scales:
            weight = name.removesuffix("scale") + "weight"
            tensors[weight] = dequantize(tensors[weight], tensors.pop(name), torch.float32)
    for name, value in tensors.items():
        if value.dtype == torch.bfloat16:
            tensors[name] = value.float()
    model.load_state_dict(tensors, assign=True)
    return model


def test_kept_weights_give_the_same_logits(checkpoint):
    """A model that keeps its weights as stored says something else than one with the same weights in fp32."""
    token_ids = torch.randint(200, (1, 30), generator=torch.Generator().manual_seed(0))
    kept, plain = _load(checkpoint, is_kept=True), _load(checkpoint, is_kept=False)
    assert any(isinstance(module, QuantizedLinear) for module in kept.modules())
    with torch.no_grad():
        torch.testing.assert_close(kept(token_ids).logits, plain(token_ids).logits, atol=1e-5, rtol=1e-5)


def test_only_the_files_with_the_module_are_opened(checkpoint):
    """The drafter's tensors are looked for in every file of a checkpoint of hundreds of gigabytes."""
    module, whole = read_index(checkpoint, "mtp."), read_index(checkpoint)
    assert all(name.startswith("mtp.") for name in module)
    assert {info.file for info in module.values()} < {info.file for info in whole.values()}


def test_same_seed_same_files(checkpoint, tmp_path):
    """A checkpoint made again differs, and whatever was measured on it cannot be repeated."""
    write_tiny_checkpoint(tmp_path)
    for file in checkpoint.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
