"""Drafters whose weights are stored in fewer bits draft what their plain weights do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_hf import DSparkAssistantModel
from dspark_hf.modeling.formats.packed import unpack
from tests.modeling.deepspec_layout import Layout, deepspec_fields, deepspec_weights
from tests.modeling.formats.layouts import speculators_fields, without_vocabulary, write

FIELDS, WEIGHTS = deepspec_fields(Layout()), deepspec_weights(Layout())
GROUP = 8


def _is_quantised(name: str) -> bool:
    return name.startswith("layers.") and "proj" in name


def _section(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def _pack(values: Tensor, bits: int) -> Tensor:
    """Return signed integers `(rows, columns)` in words, one number after the other."""
    rows, columns = values.shape
    per_word = 32 // bits
    words = torch.zeros(rows, -(-columns // per_word), dtype=torch.int64)
    for row in range(rows):
        for column in range(columns):
            stored = int(values[row, column]) + (1 << (bits - 1))
            words[row, column // per_word] |= stored << (bits * (column % per_word))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _four_bits(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    module = name.removesuffix(".weight")
    scale = weight.view(len(weight), -1, GROUP).abs().amax(-1) / 7
    spread = scale.repeat_interleave(GROUP, dim=1)
    values = (weight / spread).round().clamp(-8, 7)
    stored = {
        f"{module}.weight_packed": _pack(values, 4),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor(weight.shape),
    }
    return stored, values * spread


def _eight_bits(name: str, weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    module = name.removesuffix(".weight")
    if kind == "channel":
        scale = weight.abs().amax(1, keepdim=True) / 448
        spread = scale
    elif kind == "tensor":
        scale = spread = weight.abs().max()[None] / 448
    else:
        rows, columns = (-(-size // GROUP) for size in weight.shape)
        scale = torch.rand(rows, columns) / 100 + 0.01
        spread = scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)[: len(weight), : weight.shape[1]]
    values = (weight / spread).to(torch.float8_e4m3fn)
    # the scale of activations says nothing of weights
    stored = {name: values, f"{module}.weight_scale": scale, f"{module}.input_scale": torch.ones(1)}
    return stored, values.float() * spread


def _check(folder: Path, fields: dict[str, Any], plain: dict[str, Tensor]) -> None:
    drafter = DSparkAssistantModel.from_pretrained(folder)
    assert drafter.dtype == torch.float32
    saved = drafter.state_dict()
    assert saved.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(saved[name], expected, atol=0, rtol=1e-6, msg=name)
    # what is saved anew is plain, and loads as any other
    drafter.save_pretrained(folder / "again")
    assert "quantization_config" not in json.loads((folder / "again" / "config.json").read_text())
    again = DSparkAssistantModel.from_pretrained(folder / "again")
    assert all(torch.equal(again.state_dict()[name], saved[name]) for name in saved)


@pytest.mark.parametrize("layout", ["DeepSpec", "speculators"])
def test_four_bits_become_the_weights_they_stand_for(layout: str, tmp_path: Path) -> None:
    """A drafter in W4A16 could not be loaded, or would be built of wrong numbers."""
    weights = WEIGHTS if layout == "DeepSpec" else without_vocabulary(WEIGHTS)
    stored, plain = dict(weights), dict(weights)
    for name in filter(_is_quantised, weights):
        parts, plain[name] = _four_bits(name, weights[name])
        del stored[name]
        stored.update(parts)
    fields = FIELDS if layout == "DeepSpec" else speculators_fields()
    section = _section(num_bits=4, group_size=GROUP, strategy="group", symmetric=True)
    _check(write(tmp_path, {**fields, "quantization_config": section}, stored), fields, plain)


@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
def test_fp8_becomes_the_weights_it_stands_for(kind: str, tmp_path: Path) -> None:
    """A drafter in FP8 could not be loaded, or its weights would miss their scales."""
    stored, plain = dict(WEIGHTS), dict(WEIGHTS)
    for name in filter(_is_quantised, WEIGHTS):
        parts, plain[name] = _eight_bits(name, WEIGHTS[name], kind)
        stored.update(parts)
    section = _section(num_bits=8, type="float", strategy=kind, block_structure=[GROUP, GROUP])
    _check(write(tmp_path, {**FIELDS, "quantization_config": section}, stored), FIELDS, plain)


_NAME = "layers.0.mlp.gate_proj"
_PACKED = _four_bits(f"{_NAME}.weight", WEIGHTS[f"{_NAME}.weight"])[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{_NAME}.weight_scale": None}, f"hold a scale for every weight in fewer bits, got .*'{_NAME}.weight'"),
        ({f"{_NAME}.weight_scale": torch.ones(40, 3)}, "share its scales as its configuration says, got .*40, 3"),
        ({f"{_NAME}.weight_shape": None}, "say the sizes of its packed weights, got .*weight_shape"),
        ({f"{_NAME}.weight_packed": torch.zeros(40, 16, dtype=torch.uint8)}, "pack weights into integers of 2, 4, 8"),
        ({f"{_NAME}.weight_packed": torch.zeros(40, 3, dtype=torch.int32)}, "pack weights into integers of 2, 4, 8"),
    ],
    ids=["no scale", "other scales", "no sizes", "FP4", "three bits"],
)
def test_other_bits_are_refused(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    """Weights in bits that are not known would be read as something else."""
    stored = {name: x for name, x in WEIGHTS.items() if name != f"{_NAME}.weight"} | _PACKED | changes
    section = _section(num_bits=4, group_size=GROUP)
    kept = {name: x for name, x in stored.items() if x is not None}
    write(tmp_path, {**FIELDS, "quantization_config": section}, kept)
    with pytest.raises(ValueError, match=message):
        DSparkAssistantModel.from_pretrained(tmp_path)


def test_fp8_without_a_scale_is_missing_not_plain(tmp_path: Path) -> None:
    """A weight in FP8 whose scale is lost would be taken for the weight itself."""
    stored, name = dict(WEIGHTS), f"{_NAME}.weight"
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    write(tmp_path, FIELDS, stored)
    with pytest.raises(ValueError, match=f"hold a scale for every weight in fewer bits, got .*'{name}'"):
        DSparkAssistantModel.from_pretrained(tmp_path)


_SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {"num_bits": 4, "group_size": GROUP, "strategy": "group", "symmetric": True},
    "W4A16 asymmetric": {"num_bits": 4, "group_size": GROUP, "strategy": "group", "symmetric": False},
    "W4A16 by rows": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "W8A16": {"num_bits": 8, "group_size": GROUP, "strategy": "group", "symmetric": True},
    "FP8 by rows": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
    "FP8": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
    "FP8 blocks": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    "INT8 asymmetric": {"num_bits": 8, "strategy": "channel", "symmetric": False},
}


@pytest.mark.parametrize("scheme", _SCHEMES)
@pytest.mark.parametrize("shape", [(24, 64), (48, 96)])
def test_unpacking_equals_compressed_tensors(scheme: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """Weights would be unpacked otherwise than by the library that packed them."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(**_SCHEMES[scheme])
    is_packed = "A16" in scheme
    compressor = BaseCompressor.get_value_from_registry("pack-quantized" if is_packed else "naive-quantized")
    weight = torch.randn(shape, dtype=torch.bfloat16)
    rows, columns = shape
    sizes = {"group": (rows, columns // GROUP), "channel": (rows, 1), "tensor": (1,)}
    size = sizes.get(_SCHEMES[scheme]["strategy"], (-(-rows // 16), columns // 32))
    scale = (torch.rand(size) / 20 + 0.05).to(torch.bfloat16)
    state = {"weight": weight, "weight_scale": scale}
    if not arguments.symmetric:
        state["weight_zero_point"] = torch.randint(-7, 7, size, dtype=torch.int8)
    quantised = QuantizationScheme(targets=["Linear"], weights=arguments)
    stored = compressor.compress(state, quantised)
    expected = compressor.decompress(stored, quantised)["weight"]
    save_file({f"a.{name}": x.contiguous() for name, x in stored.items()}, tmp_path / "stored.safetensors")
    fields = {"quantization_config": _section(**_SCHEMES[scheme])}
    found = unpack(load_file(tmp_path / "stored.safetensors"), fields)
    assert found.keys() == {"a.weight"}
    assert torch.equal(found["a.weight"], expected)
