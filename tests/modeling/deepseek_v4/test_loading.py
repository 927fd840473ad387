"""Loading DeepSeek-V4: formats, dtypes, devices, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig
from transformers.utils import logging

from dspark_hf import DeepseekV4DSparkConfig, DeepseekV4DSparkModel
from dspark_hf.modeling.deepseek_v4.linear import QuantizedWeight
from dspark_hf.modeling.formats.deepseek_v4 import PREFIX
from tests.closeness import assert_same_up_to_rounding, relative_difference
from tests.modeling.deepseek_v4.checkpoints import (
    assert_same_bytes,
    assert_same_logits,
    assert_same_model,
    load,
    logits,
    read_files,
)
from tests.thinning import slow

# every format and every dtype once
QUICK_DTYPES = {("fp4", None), ("fp8", torch.bfloat16), ("bf16", torch.float32)}
STRICT = ("hc_", "attn_sink", "gate", "compressor", "head")


def _is_kept(model) -> bool:
    return any(isinstance(module, QuantizedWeight) for module in model.modules())


@pytest.mark.parametrize(
    ("dtype", "experts"),
    [
        (torch.float32, "fp4"),
        slow(torch.bfloat16, "fp8"),
        slow(torch.float32, "fp8"),
        slow(torch.bfloat16, "fp4"),
    ],
)
def test_kept_weights_give_the_same_logits(checkpoints, experts, dtype):
    """A model that keeps its weights as stored says something else than one with the same weights dequantised."""
    kept = load(checkpoints[experts], dtype=dtype, keep_quantized=True)
    plain = load(checkpoints[experts], dtype=dtype)
    assert _is_kept(kept)
    assert not _is_kept(plain)
    assert_same_logits(kept, plain)


@pytest.mark.parametrize(
    ("options", "is_kept"),
    [
        ({}, True),
        slow({"dtype": "auto"}, True),
        slow({"dtype": "float32"}, False),
        ({"dtype": torch.bfloat16}, False),
        slow({"keep_quantized": False}, False),
        ({"dtype": torch.bfloat16, "keep_quantized": True}, True),
    ],
)
def test_when_weights_are_kept(checkpoints, options, is_kept):
    """Weights are dequantised unasked, and do not fit; or kept where a dtype was asked for."""
    assert _is_kept(load(checkpoints["fp4"], **options)) == is_kept


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [
        (pytest.param if (experts, dtype) in QUICK_DTYPES else slow)(experts, dtype)
        for experts in ("fp4", "fp8", "bf16")
        for dtype in (None, torch.bfloat16, torch.float32)
    ],
)
def test_dtypes(checkpoints, experts, dtype):
    """Router, streams or head run in bf16, and choices differ from the released code's; or tables become floats."""
    stored = read_files(checkpoints[experts])
    model = load(checkpoints[experts], dtype=dtype)
    assert model.dtype == model.config.dtype == (dtype or torch.bfloat16)
    for own, parameter in model.named_parameters():
        name = own.removeprefix("model.")
        is_quantized = isinstance(model.get_submodule(own.rpartition(".")[0]), QuantizedWeight)
        if is_quantized or not stored[name].dtype.is_floating_point and name.endswith("tid2eid"):
            wanted = stored[name].dtype
        elif any(part in name for part in STRICT):
            wanted = torch.float32
        else:
            wanted = dtype or torch.bfloat16
        assert parameter.dtype == wanted, name
        assert not parameter.is_meta, name


def test_what_a_loaded_model_is_like(checkpoints):
    """A loaded model drops out, stops nowhere, or forgets its name."""
    model = load(checkpoints["fp4"], cache_dtype="fp8")
    assert not model.training
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 1
    assert model.name_or_path == str(checkpoints["fp4"])
    assert model.config.cache_dtype == "fp8"
    _, info = load(checkpoints["fp4"], output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}], ids=["kept", "dequantized"])
def test_how_far_loading_is(checkpoints, monkeypatch, options):
    """Nothing is to be seen for minutes while a full-size model is loaded, or the bar ends short of its end."""
    bars = []
    original = logging.tqdm
    monkeypatch.setattr(logging, "tqdm", lambda *args, **kwargs: bars.append(original(*args, **kwargs)) or bars[-1])
    model = load(checkpoints["fp4"], **options)
    assert bars[-1].total == bars[-1].n == len(list(model.parameters()))
    titles = ["Loading weights"] if options else ["Preparing layers", "Loading weights"]
    assert [bar.desc.strip(": ") for bar in bars] == titles


@pytest.mark.parametrize(
    "options",
    [{"cache_dtype": "fp8", "indexer_dtype": "fp4"}, slow({"cache_dtype": "fp8"}), slow({"indexer_dtype": "fp4"})],
    ids=str,
)
def test_rounded_cache_in_the_released_dtype(checkpoints, options):
    """A bf16 model cannot have a cache of 8 or 4 bits, or reads something else from it than it wrote."""
    model, plain = load(checkpoints["fp4"], **options), load(checkpoints["fp4"])
    token_ids = torch.randint(200, (2, 40))
    with torch.no_grad():
        outputs = model(token_ids)
        assert_same_up_to_rounding(outputs.logits, model(token_ids, use_cache=False).logits, model.dtype)
        assert outputs.past_key_values.num_bytes < plain(token_ids).past_key_values.num_bytes
        exact = load(checkpoints["fp4"], dtype=torch.float32, **options)
        # a last bit may turn a rounding to 8 or 4 bits, which moves this by 1e-3; without them it were 1e-2
        assert relative_difference(exact(token_ids).logits, exact(token_ids, use_cache=False).logits) < 5e-3
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(token_ids, use_dspark=True, **options).shape == (2, 42)


def test_configuration_of_the_caller_stays(checkpoints):
    """Loading changes a configuration that others use."""
    config = DeepseekV4DSparkConfig.from_pretrained(checkpoints["fp4"])
    before = config.to_dict()
    assert load(checkpoints["fp4"], config=config, dtype=torch.float32, max_rollback=3).config.max_rollback == 3
    assert config.to_dict() == before


def test_the_bare_decoder(checkpoints):
    """The decoder alone cannot be loaded from a checkpoint with a head."""
    decoder = DeepseekV4DSparkModel.from_pretrained(checkpoints["fp4"])
    whole = load(checkpoints["fp4"])
    token_ids = torch.arange(9)[None]
    with torch.no_grad():
        states = whole.model(token_ids).last_hidden_state
        assert_same_up_to_rounding(decoder(token_ids).last_hidden_state, states)
    assert_same_bytes(decoder.state_dict(), whole.model.state_dict())


def test_own_names_are_understood(checkpoints, tmp_path):
    """A folder whose names begin with `model.` cannot be loaded."""
    tensors = {
        name if name.startswith("head.") else f"model.{name}": tensor
        for name, tensor in read_files(checkpoints["fp4"]).items()
        if not name.startswith(PREFIX)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(checkpoints["fp4"] / "config.json", tmp_path)
    assert_same_model(load(tmp_path), load(checkpoints["fp4"]))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="kept", marks=pytest.mark.slow),
        pytest.param({"dtype": torch.float32}, id="dequantized"),
    ],
)
def test_disk(checkpoints, tmp_path, options):
    """Layers on disk compute something else, or the weights of another run."""
    expected = load(checkpoints["fp4"], **options)
    for _ in range(2):
        model = load(
            checkpoints["fp4"],
            device_map="auto",
            max_memory={"cpu": _size(expected) // 2},
            offload_folder=tmp_path,
            **options,
        )
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}
        assert_same_logits(model, expected)
        # what is kept is read from the checkpoint itself
        assert any(tmp_path.iterdir()) == bool(options)


def _size(model) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("device_map", ["auto", slow("cpu"), slow(torch.device("cpu")), slow({"": "cpu"})])
def test_all_on_one_device(checkpoints, device_map):
    """A device map changes what a model says."""
    model = load(checkpoints["fp4"], device_map=device_map)
    assert {str(device) for device in model.hf_device_map.values()} == {"cpu"}
    assert_same_model(model, load(checkpoints["fp4"]))


@pytest.mark.parametrize(
    ("is_all", "use_dspark"), [slow(False, True), (True, True), slow(False, False), slow(True, False)]
)
def test_generation_from_disk(checkpoints, is_all, use_dspark):
    """A cache or a drafter cannot be used where layers, or the embedding too, are on disk."""
    whole = load(checkpoints["fp4"], dtype=torch.float32, keep_quantized=True)
    options = (
        {"device_map": {"": "disk"}} if is_all else {"device_map": "auto", "max_memory": {"cpu": _size(whole) // 2}}
    )
    parts = load(checkpoints["fp4"], dtype=torch.float32, keep_quantized=True, **options)
    assert "disk" in parts.hf_device_map.values()
    assert parts.device == torch.device("cpu")
    token_ids = torch.arange(5)[None].to(parts.device)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = whole.generate(token_ids, **options)
    assert torch.equal(parts.generate(token_ids, use_dspark=use_dspark, **options), expected)


@pytest.mark.parametrize(
    "options", [slow({"load_in_8bit": True}), {"load_in_4bit": True}], ids=lambda options: [*options][0]
)
def test_bitsandbytes(checkpoints, options):
    """Layers that run in fp32 or in groups are quantised, or the model says something else altogether."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = load(checkpoints["fp4"], quantization_config=BitsAndBytesConfig(**options))
    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    quantized = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds)}
    assert quantized == {"wq_a", "wq_b", "wkv", "wo_b", "w1", "w2", "w3"}
    assert not any(isinstance(module, kinds) for name, module in model.named_modules() if "compressor" in name)
    plain = logits(load(checkpoints["fp4"]))
    # 8 bits come to 0.99 and 4 bits, of weights that were in 4 bits before, to 0.90, more or less where a rounding
    # lets a token choose another expert; another model comes to 0.0
    assert torch.cosine_similarity(logits(model).flatten(), plain.flatten(), dim=0) > 0.8


def _changed(source, folder, change):
    """Copy a checkpoint, its first file changed."""
    shutil.copytree(source, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    file = index["weight_map"]["embed.weight"]
    tensors = load_file(folder / file)
    change(tensors)
    (folder / file).unlink()
    save_file(tensors, folder / file)
    return folder


UNFIT = {
    "missing": (lambda tensors: tensors.pop("embed.weight"), r"got 1 missing: embed\.weight\."),
    "unexpected": (lambda tensors: tensors.update({"layers.9.x": torch.ones(1)}), r"got 1 unexpected: layers\.9\.x\."),
    "shape": (lambda tensors: tensors.update({"embed.weight": torch.ones(1, 2)}), r"`embed\.weight` must have the sh"),
}


@pytest.mark.parametrize(
    ("way", "what"),
    [
        (slow if (way == "kept") == (what == "shape") else pytest.param)(way, what)
        for way in ("kept", "dequantized")
        for what in UNFIT
    ],
)
def test_other_tensors_are_refused(checkpoints, tmp_path, way, what):
    """A checkpoint that does not fit gives a model with random or lost weights."""
    change, message = UNFIT[what]
    options = {} if way == "kept" else {"dtype": torch.float32}
    folder = _changed(checkpoints["fp4"], tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "`dtype` must be a floating-point dtype, got 'int8'"),
        ({"surprise": 1}, r"`kwargs` must be options .* got \['surprise'\]"),
        ({"cache_dtype": "int8"}, "`cache_dtype` must be None or 'fp8', got 'int8'"),
        ({"indexer_dtype": "fp8"}, "`indexer_dtype` must be None or 'fp4', got 'fp8'"),
        ({"device_map": "automatic"}, "`device_map` must be one of auto, .* got 'automatic'"),
        ({"device_map": {"head": "cpu"}}, "`device_map` must name a device for every weight"),
        (
            {"device_map": {"": "disk"}, "dtype": torch.float32},
            "`offload_folder` must be given where dequantised weights are put on disk",
        ),
        (
            {"keep_quantized": True, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
            "`keep_quantized` must be left out",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "`quantization_config` must be a BitsAndBytesConfig"),
    ],
)
def test_arguments_are_checked(checkpoints, options, message):
    """A wrong argument is passed over in silence."""
    with pytest.raises(ValueError, match=message):
        load(checkpoints["fp4"], **options)
