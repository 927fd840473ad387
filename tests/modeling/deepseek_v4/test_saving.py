"""Saving DeepSeek-V4 in the released form."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from dspark_hf.modeling.deepseek_v4.checkpoints import saving
from dspark_hf.modeling.formats.deepseek_v4 import PREFIX
from dspark_hf.modeling.formats.tensors import INDEX_NAME, SINGLE_NAME
from tests.closeness import assert_same_up_to_rounding
from tests.modeling.deepseek_v4.checkpoints import (
    assert_same_bytes,
    assert_same_model,
    load,
    logits,
    read_files,
)
from tests.modeling.deepseek_v4.tiny import tiny_model
from tests.thinning import slow


@pytest.mark.parametrize(
    ("size", "experts"),
    [
        slow("5GB", "fp8"),
        ("100KB", "fp4"),
        slow("5GB", "bf16"),
        slow("5GB", "fp4"),
        slow("100KB", "fp8"),
        slow("100KB", "bf16"),
    ],
)
def test_every_tensor_comes_back(checkpoints, tmp_path, experts, size):
    """A checkpoint loaded and saved is not the same: names, formats, bits, or the DSpark module are lost."""
    load(checkpoints[experts]).save_pretrained(tmp_path, max_shard_size=size)
    assert_same_bytes(read_files(tmp_path), read_files(checkpoints[experts]))
    assert_same_model(load(tmp_path), load(checkpoints[experts]))


def test_shards(checkpoints, tmp_path):
    """The index names a wrong file, or the module's tensors lie among the target's."""
    load(checkpoints["fp4"]).save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / INDEX_NAME).read_text(encoding="utf-8"))
    total = 0
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        assert tensors.keys() == {name for name, one in index["weight_map"].items() if one == file.name}
        assert len({name.startswith(PREFIX) for name in tensors}) == 1
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 100_000
        total += sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total


def test_from_disk(checkpoints, tmp_path):
    """Weights that are not in memory are not saved."""
    model = load(checkpoints["fp4"], device_map="auto", max_memory={"cpu": "500KB"})
    assert "disk" in model.hf_device_map.values()
    model.save_pretrained(tmp_path)
    assert_same_bytes(read_files(tmp_path), read_files(checkpoints["fp4"]))


def test_over_its_own_checkpoint(checkpoints, tmp_path):
    """Saving where the weights are mapped from destroys both."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["fp4"], folder)
    model, before = load(folder), logits(load(folder))
    for size in ("100KB", "5GB"):
        model.save_pretrained(folder, max_shard_size=size)
        assert_same_bytes(read_files(folder), read_files(checkpoints["fp4"]))
        assert_same_up_to_rounding(logits(model), before, model.dtype)
    assert (folder / "tokenizer.json").exists()


def test_not_where_weights_are_read_from(checkpoints, tmp_path):
    """A model whose layers are on disk loses them while it runs."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["fp4"], folder)
    model = load(folder, device_map={"": "disk"})
    with pytest.raises(ValueError, match="`save_directory` must be another folder"):
        model.save_pretrained(folder)


def test_configuration_is_the_released_one(checkpoints, tmp_path):
    """Other programs do not recognise what we saved."""
    load(checkpoints["fp4"]).save_pretrained(tmp_path)
    released, saved = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (checkpoints["fp4"], tmp_path)
    )
    moved = {"torch_dtype", "transformers_version"}
    assert {name: saved.get(name) for name in released.keys() - moved} == {
        name: value for name, value in released.items() if name not in moved
    }
    assert AutoConfig.from_pretrained(tmp_path).model_type == "deepseek_v4"
    assert (tmp_path / "generation_config.json").exists()


def test_fields_of_ours_are_saved_in_our_form(checkpoints, tmp_path):
    """A model that was saved rounds its keys no more, or other programs read of an option they do not know."""
    model = load(checkpoints["fp4"], indexer_dtype="fp4")
    model.save_pretrained(tmp_path / "ours", released=False)
    model.save_pretrained(tmp_path / "released", released=True)
    assert load(tmp_path / "ours").config.indexer_dtype == "fp4"
    assert_same_model(load(tmp_path / "ours"), model)
    assert "indexer_dtype" not in json.loads((tmp_path / "released" / "config.json").read_text(encoding="utf-8"))


def test_dequantized(checkpoints, tmp_path):
    """A dequantised model is saved as if it were in FP8, or with scales."""
    model = load(checkpoints["fp4"], keep_quantized=False)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in saved
    assert saved.get("expert_dtype") is None
    tensors = {name: tensor for name, tensor in read_files(tmp_path).items() if not name.startswith(PREFIX)}
    assert not any(name.endswith(".scale") for name in tensors)
    # held in fp32, stored in bf16
    assert tensors["head.weight"].dtype == torch.bfloat16
    assert tensors["layers.0.ffn.experts.0.w1.weight"].dtype == torch.bfloat16
    # what was held in fp32 comes back as it was: its values came from bf16
    assert_same_model(load(tmp_path), model)


def test_fp32_stays(checkpoints, tmp_path):
    """A model trained in fp32 is rounded to bf16 when it is saved."""
    model = load(checkpoints["bf16"], dtype=torch.float32)
    with torch.no_grad():
        model.head.weight += 1e-4
    model.save_pretrained(tmp_path)
    assert_same_model(load(tmp_path), model)


@pytest.mark.parametrize("released", [slow(None), False, True])
def test_a_fresh_model(tmp_path, released):
    """A model that was never loaded cannot be saved and loaded."""
    model = tiny_model()
    model.save_pretrained(tmp_path, released=released)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["model_type"] == ("deepseek_v4" if released else "deepseek_v4_dspark")
    if released:
        # readers tell by these keys whether there is a DSpark module
        assert not [name for name in saved if name.startswith("dspark_")]
    assert not any(name.startswith("model.") for name in read_files(tmp_path))
    again = load(tmp_path) if released else AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(again, model)


def test_weights_of_the_caller(tmp_path):
    """A trainer's gathered weights are passed over."""
    model, other = tiny_model(0), tiny_model(1)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    # as a trainer that goes on from a checkpoint
    model.load_state_dict(read_files(tmp_path), strict=False)
    assert_same_model(model, other)


def test_a_failure_leaves_the_folder(checkpoints, tmp_path, monkeypatch):
    """A full disk leaves half a checkpoint, or takes the one that was there."""
    folder = tmp_path / "model"
    model = load(checkpoints["fp4"])
    model.save_pretrained(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*args):
        raise OSError("full")

    monkeypatch.setattr(saving, "write_json", fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="full"):
            model.save_pretrained(target, max_shard_size="100KB")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_stale_shards_go(checkpoints, tmp_path):
    """The index of an earlier, larger checkpoint stays and names files that are gone."""
    model = load(checkpoints["fp4"])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == [SINGLE_NAME]


def test_what_cannot_be_saved(checkpoints, tmp_path):
    """An argument is passed over, or a folder is written that nothing can load."""
    with pytest.raises(ValueError, match="`push_to_hub` must be false"):
        load(checkpoints["fp4"]).save_pretrained(tmp_path, push_to_hub=True)
    pytest.importorskip("bitsandbytes")
    model = load(checkpoints["fp4"], quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match="`save_pretrained` must be called on a model in the released formats"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
