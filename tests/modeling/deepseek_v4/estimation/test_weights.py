"""Parameters and bytes of weights: against native models, and against what is published of the releases."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dspark_hf.modeling.deepseek_v4.estimation.formats import WeightFormat, stored_bytes
from dspark_hf.modeling.deepseek_v4.estimation.known import CONFIGURATIONS, FLASH_DSPARK, PRO_DSPARK, claim_of
from dspark_hf.modeling.deepseek_v4.estimation.reading import model_from_fields, read_model
from dspark_hf.modeling.deepseek_v4.estimation.shapes import Quantization
from dspark_hf.modeling.deepseek_v4.estimation.tensors import Tensor, drafter_tensors, target_tensors
from dspark_hf.modeling.deepseek_v4.estimation.weights import count_weights, tensor_bytes
from tests.modeling.deepseek_v4.estimation.native import TINY_V4, TINY_V32, native_config, num_native_parameters

FLASH, PRO = "deepseek-ai/DeepSeek-V4-Flash", "deepseek-ai/DeepSeek-V4-Pro"


def _weights(name: str, weight_format: WeightFormat = WeightFormat.released):
    model = read_model(name)
    return count_weights(target_tensors(model.shape), model.quantization, weight_format)


def _drafter_weights(name: str):
    model = read_model(name)
    tensors = drafter_tensors(model.shape, model.shape.drafter)
    return count_weights(tensors, model.quantization, WeightFormat.released)


def _num_stored(tensors: list[Tensor]) -> int:
    # a quantised matrix brings a tensor of scales
    return sum(tensor.count * (2 if tensor.kind in ("linear", "expert") else 1) for tensor in tensors)


@pytest.mark.parametrize("fields", [TINY_V4, TINY_V32, {**TINY_V4, "tie_word_embeddings": True}])
def test_parameters_equal_the_native_model(fields):
    """A tensor is forgotten, counted twice, or has the wrong shape."""
    saved = json.loads(native_config(fields).to_json_string(use_diff=True))
    model = model_from_fields("tiny", saved)
    weights = count_weights(target_tensors(model.shape), model.quantization, WeightFormat.fp32)
    assert weights.num_parameters == num_native_parameters(fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", [FLASH, PRO, "deepseek-ai/DeepSeek-V3.2"])
def test_parameters_equal_the_native_model_of_full_size(name):
    """A size of a release is wrong, or its layers are read otherwise than Transformers reads them."""
    fields = {key: value for key, value in CONFIGURATIONS[name].items() if key != "quantization_config"}
    assert _weights(name).num_parameters == num_native_parameters(fields)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [(FLASH, "284", "13"), (PRO, "1.6e+03", "49"), ("deepseek-ai/DeepSeek-V3.2", "6.7e+02", "37")],
)
def test_published_parameters(name, total, active):
    """The estimate contradicts the model card."""
    weights = _weights(name)
    digits = 3 if total == "284" else 2
    assert f"{weights.num_parameters / 1e9:.{digits}g}" == total
    assert f"{weights.num_active_parameters / 1e9:.2g}" == active
    assert claim_of(name).active == float(active)


def test_published_files_of_flash():
    """Bytes or tensors differ from the released files: 72,317 tensors in 166.88 GB, 4,705 in 10.863 GB the drafter."""
    model = read_model(FLASH_DSPARK)
    target, drafter = target_tensors(model.shape), drafter_tensors(model.shape, model.shape.drafter)
    assert _num_stored(drafter) == 4705
    assert _num_stored(target) + _num_stored(drafter) == 72317
    drafter_weights = _drafter_weights(FLASH_DSPARK)
    assert drafter_weights.num_bytes / 1e9 == pytest.approx(10.863, abs=5e-4)
    assert drafter_weights.num_parameters / 1e9 == pytest.approx(19.85, abs=5e-3)
    assert (_weights(FLASH_DSPARK).num_bytes + drafter_weights.num_bytes) / 1e9 == pytest.approx(166.88, abs=5e-3)


def test_published_files_of_pro():
    """Bytes or tensors differ from the first release's files, MTP-1 module included: 145,116 tensors in 864.7 GB."""
    model = read_model(PRO)
    shape, width = model.shape, model.shape.hidden_size
    one, two = (drafter_tensors(shape, replace(shape.drafter, num_stages=number)) for number in (1, 2))
    num_tensors = _num_stored(two) - _num_stored(one)
    num_bytes = sum(
        sign * tensor_bytes(tensor, model.quantization, WeightFormat.released)
        for sign, tensors in ((1, two), (-1, one))
        for tensor in tensors
    )
    # MTP-1: one stage, two projections, three norms, and what merges the streams
    mtp = [Tensor("mtp", (width, width), "linear", count=2), Tensor("mtp", (width,), "kept", count=3)]
    mtp += [Tensor("mtp", size, "fp32") for size in ((4, 4 * width), (4,), (1,))]
    num_tensors += _num_stored(mtp) + _num_stored(target_tensors(shape))
    num_bytes += sum(tensor_bytes(tensor, model.quantization, WeightFormat.released) for tensor in mtp)
    assert num_tensors == 145116
    assert (num_bytes + _weights(PRO).num_bytes) / 1e9 == pytest.approx(864.7, abs=0.05)


def test_previews_show_the_drafter_of_their_dspark_release():
    """A preview is estimated with another drafter than the one made for it."""
    for preview, release in ((FLASH, FLASH_DSPARK), (PRO, PRO_DSPARK)):
        assert _drafter_weights(preview) == _drafter_weights(release)


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        ("fp32", 4 * 130 * 70),
        ("bf16", 2 * 130 * 70),
        # two blocks of rows, one of columns, four bytes each
        ("fp8", 130 * 70 + 2 * 1 * 4),
        # 70 columns are three groups of 32
        ("fp4", 130 * 70 // 2 + 130 * 3),
        ("int8", 130 * 70 + 130 * 4),
        # 9100 elements are 143 groups of 64
        ("int4", 130 * 70 // 2 + 143 * 4),
    ],
)
def test_bytes_of_one_matrix(storage, expected):
    """Scales are forgotten, or blocks at the border are."""
    assert stored_bytes(storage, 130, 70, fp8_scale_bytes=4) == expected


def test_formats_apply_to_what_the_release_quantises():
    """A format changes the embedding, or leaves the experts as they are."""
    quantization = Quantization("fp8", "fp4", fp8_scale_bytes=1)
    expert, kept, table = (Tensor("part", (128, 128), kind) for kind in ("expert", "kept", "ids"))
    sizes = {
        one: [tensor_bytes(tensor, quantization, one) for tensor in (expert, kept, table)] for one in WeightFormat
    }
    elements = 128 * 128
    assert sizes[WeightFormat.released] == [elements // 2 + 128 * 4, 2 * elements, 8 * elements]
    assert sizes[WeightFormat.bf16] == [2 * elements, 2 * elements, 8 * elements]
    assert sizes[WeightFormat.fp32] == [4 * elements, 4 * elements, 8 * elements]
    assert sizes[WeightFormat.int8] == [elements + 128 * 4, 2 * elements, 8 * elements]
    assert sizes[WeightFormat.int4] == [elements // 2 + elements // 64 * 4, 2 * elements, 8 * elements]


def test_base_releases_have_fp8_experts():
    """A base release is estimated with the experts of the other, at half its size."""
    assert _weights(f"{FLASH}-Base").num_bytes > 1.7 * _weights(FLASH).num_bytes
