"""Checkpoints of DeepSeek-V4 with damaged, missing, foreign or dangerous files."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_hf import DSparkAssistantModel
from dspark_hf.modeling.deepseek_v4.tiny import write_tiny_checkpoint
from dspark_hf.modeling.formats.tensors import INDEX_NAME
from tests.modeling.deepseek_v4.checkpoints import assert_same_bytes, assert_same_logits, load, read_files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
WAYS = pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}], ids=["kept", "dequantized"])


@pytest.fixture
def folder(checkpoints, tmp_path):
    """Return a copy of a checkpoint with FP4 experts, FP8 matrices and a DSpark module."""
    shutil.copytree(checkpoints["fp4"], tmp_path / "copy")
    return tmp_path / "copy"


def _index(folder):
    return json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))


def _write_index(folder, content):
    (folder / INDEX_NAME).write_text(json.dumps(content), encoding="utf-8")


def _edit(folder, name, change):
    """Change the tensors of the file that holds `name`, and the index with them."""
    index = _index(folder)
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)
    kept = {one: where for one, where in index["weight_map"].items() if where != file.name}
    _write_index(folder, {**index, "weight_map": {**kept, **dict.fromkeys(tensors, file.name)}})


@WAYS
@pytest.mark.parametrize("name", ["layers.0.attn.wq_a", "layers.0.ffn.experts.0.w1"], ids=["fp8", "fp4"])
def test_a_weight_without_its_scale_is_missing_one(folder, name, options):
    """A weight in FP8 is taken for plain numbers and comes out a thousand times too large, without a word."""
    _edit(folder, f"{name}.scale", lambda tensors: tensors.pop(f"{name}.scale"))
    with pytest.raises(ValueError, match=rf"got 1 missing: {name}\.scale\."):
        load(folder, **options)


def test_a_stages_weight_without_its_scale_is_missing_one(folder):
    """A drafter drafts noise from a weight whose scale is not there, or the error has another name than the file."""
    _edit(folder, "mtp.0.main_proj.scale", lambda tensors: tensors.pop("mtp.0.main_proj.scale"))
    with pytest.raises(ValueError, match=r"got 1 missing: mtp\.0\.main_proj\.scale\."):
        DSparkAssistantModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scale: scale[:, :1].contiguous(), r"w1\.scale` must have the shape \(64, 4\), got \(64, 1\)"),
        (lambda scale: scale.float().to(torch.bfloat16), r"w1\.scale` must be in E8M0 or fp32, got torch\.bfloat16"),
    ],
    ids=["shape", "dtype"],
)
@WAYS
def test_scales_that_do_not_fit_are_refused_while_loading(folder, change, message, options):
    """A model loads, and dies in the middle of its first forward pass."""
    name = "layers.0.ffn.experts.0.w1.scale"
    _edit(folder, name, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


def test_unexpected_tensors_of_a_stage_have_their_own_name(folder):
    """An error names a tensor that no file has."""
    name = "mtp.0.ffn.gate.surprise"
    _edit(folder, "mtp.0.ffn.gate.bias", lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(ValueError, match=r"got 1 unexpected: mtp\.0\.ffn\.gate\.surprise\."):
        DSparkAssistantModel.from_pretrained(folder)


DAMAGES = {
    "cut off": (lambda content: content[:-1], "holds no whole safetensors"),
    "in the header": (lambda content: content[:20], "holds no whole safetensors"),
    "empty": (lambda content: b"", "is empty"),
    "zeros": (lambda content: bytes(1000), "holds no whole safetensors"),
    "web page": (lambda content: b"<!DOCTYPE html><html>Not found</html>", "is a web page"),
    "pointer": (lambda content: POINTER, "is a Git LFS pointer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(folder, damage):
    """Of 48 files one is broken, and the error does not say which."""
    change, message = DAMAGES[damage]
    for name, read in (("embed.weight", load), ("mtp.0.ffn.gate.bias", DSparkAssistantModel.from_pretrained)):
        file = folder / _index(folder)["weight_map"][name]
        file.write_bytes(change(file.read_bytes()))
        with pytest.raises(ValueError, match=rf"{file.name}', which {message}.* Fetch that file again"):
            read(folder)


def test_what_is_no_file_is_not_waited_for(folder):
    """A pipe in a file's place hangs for ever."""
    file = folder / _index(folder)["weight_map"]["embed.weight"]
    file.unlink()
    os.mkfifo(file)
    with pytest.raises((ValueError, OSError), match=file.name):
        load(folder)


def test_a_file_that_is_absent_is_named(folder):
    """Of 48 files one is not there, and the error does not say which."""
    file = folder / _index(folder)["weight_map"]["embed.weight"]
    file.unlink()
    with pytest.raises(OSError, match=file.name):
        load(folder)


INDICES = {
    "no JSON": (b"{", "must hold whole files, got '.*index.json', which holds no JSON"),
    "pointer": (POINTER, "must hold whole files, got '.*index.json', which holds no JSON"),
    "no map": (b"{}", "got '.*index.json', which holds no `weight_map`"),
    "list": (b'{"weight_map": ["a"]}', "got '.*index.json', which holds no `weight_map`"),
    "list itself": (b"[1]", "got '.*index.json', which holds no JSON object but"),
    "number": (b'{"weight_map": {"x": 5}}', "got '.*index.json', which names 5, which is no file in its folder"),
    **{
        path: (
            json.dumps({"weight_map": {"x": path}}).encode(),
            "got '.*index.json', which names .*, which is no file in its folder",
        )
        for path in ("../other/model.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "..\\x", "\\x", "")
    },
}


@pytest.mark.parametrize("index", INDICES)
def test_an_index_that_is_none_is_refused(folder, index):
    """A damaged index is a KeyError, or one that names files elsewhere has them read."""
    content, message = INDICES[index]
    (folder / INDEX_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_files_below_the_folder_are_read(folder, checkpoints):
    """A checkpoint whose files lie in a folder of their own is refused as if it reached outside."""
    (folder / "weights").mkdir()
    index = _index(folder)
    for file in {*index["weight_map"].values()}:
        (folder / file).rename(folder / "weights" / file)
    _write_index(folder, {"weight_map": {name: f"weights/{file}" for name, file in index["weight_map"].items()}})
    assert_same_logits(load(folder), load(checkpoints["fp4"]))


def test_the_target_alone_needs_no_files_of_its_drafter(folder, checkpoints, tmp_path):
    """Ten gigabytes are fetched, or must be there, for a drafter that nobody asked for."""
    files = {file for name, file in _index(folder)["weight_map"].items() if name.startswith("mtp.")}
    for file in files:
        (folder / file).rename(tmp_path / file)
    model = load(folder)
    assert_same_logits(model, load(checkpoints["fp4"]))
    # a copy without them would promise a drafter that it has not
    with pytest.raises(OSError, match=sorted(files)[0]):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    for file in files:
        (tmp_path / file).rename(folder / file)
    model.save_pretrained(tmp_path / "saved")
    assert_same_bytes(read_files(tmp_path / "saved"), read_files(checkpoints["fp4"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, r"must hold a config\.json, got '.*copy' without one"),
        ({"model_type": "llama"}, r"with model type 'llama'\. Load it with `AutoModelForCausalLM`"),
        ({"model_type": "deepseek_v41"}, r"with model type 'deepseek_v41'\. The installed Transformers has no class"),
    ],
    ids=["none", "known", "unknown"],
)
def test_other_models_are_told_apart(folder, fields, message):
    """A missing file is taken for another kind of model, or advice leads to a class that does not exist."""
    (folder / "config.json").unlink()
    if fields is not None:
        (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(folder)


def _add_images(folder):
    """Make a checkpoint look like the one that also reads images."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields = {**config, "vision_hidden_size": 64, "num_nextn_predict_layers": 3, "rms_norm_eps": 1e-20}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    names = ("layers.0.ffn.gate.bias_vl", "vision.blocks.0.attn.weight", "aligner.proj.weight", "image_newline")
    _edit(folder, "embed.weight", lambda tensors: tensors.update({name: torch.ones(3) for name in names}))
    _edit(folder, "mtp.0.ffn.gate.bias", lambda tensors: tensors.update({"mtp.0.ffn.gate.bias_vl": torch.ones(3)}))


def test_a_checkpoint_that_reads_images_opens_for_text(folder, tmp_path):
    """The tensors that serve images alone keep the text model from loading, or are lost when it is saved."""
    _add_images(folder)
    model = load(folder, dtype=torch.float32)
    token_ids = torch.arange(3, 20)[None]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(token_ids, use_dspark=True, **options), model.generate(token_ids, **options))
    load(folder).save_pretrained(tmp_path / "saved")
    assert_same_bytes(read_files(tmp_path / "saved"), read_files(folder))
    assert load(tmp_path / "saved").config.vision_hidden_size == 64


def test_such_tensors_are_unexpected_elsewhere(folder):
    """A text checkpoint with a part of another model in it is loaded without a word."""
    _add_images(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("vision_hidden_size")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="got 4 unexpected: aligner"):
        load(folder)
    with pytest.raises(ValueError, match=r"got 1 unexpected: mtp\.0\.ffn\.gate\.bias_vl"):
        DSparkAssistantModel.from_pretrained(folder)


def test_without_a_drafter_nothing_else_is_asked_for(tmp_path):
    """A checkpoint in one file or without a module cannot be saved."""
    write_tiny_checkpoint(tmp_path / "one", with_dspark=False, max_shard_bytes=1 << 30)
    load(tmp_path / "one").save_pretrained(tmp_path / "saved")
    assert_same_bytes(read_files(tmp_path / "saved"), read_files(tmp_path / "one"))
