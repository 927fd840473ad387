"""Configurations by name and from folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dspark_hf.modeling.deepseek_v4.estimation import reading
from dspark_hf.modeling.deepseek_v4.estimation.known import CONFIGURATIONS, FLASH_DSPARK, PRO_DSPARK
from dspark_hf.modeling.deepseek_v4.estimation.reading import model_from_fields, read_model
from dspark_hf.modeling.deepseek_v4.estimation.shapes import AttentionKind
from tests.modeling.deepseek_v4.estimation.native import TINY_V4, TINY_V32, native_config


def _write(folder: Path, fields: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return str(folder)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> str:
        raise OSError("no network\nand more lines")

    monkeypatch.setattr(reading, "_download", refuse)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_known_names_need_no_network(no_network, name):
    """A known model cannot be estimated offline."""
    assert read_model(name).name == name


@pytest.mark.parametrize(
    ("name", "counts"), [(FLASH_DSPARK, (2, 21, 20)), (PRO_DSPARK, (0, 30, 31))], ids=["flash", "pro"]
)
def test_layers_of_the_releases(name, counts):
    """The drafter's entries of `compress_ratios` are taken for target layers, or kinds are mixed up."""
    shape = read_model(name).shape
    kinds = [layer.kind for layer in shape.layers]
    assert tuple(kinds.count(kind) for kind in AttentionKind) == counts
    assert (shape.drafter.num_stages, shape.drafter.num_tapped_layers) == (3, 3)


@pytest.mark.parametrize("name", [FLASH_DSPARK, "deepseek-ai/DeepSeek-V3.2"])
def test_a_folder_equals_the_known_name(tmp_path, name):
    """A downloaded model is estimated otherwise than its name."""
    read = read_model(_write(tmp_path, {**CONFIGURATIONS[name], "transformers_version": "4.57.1"}))
    known = read_model(name)
    assert (read.shape, read.quantization) == (known.shape, known.quantization)
    # the file itself will do too
    assert read_model(str(tmp_path / "config.json")).shape == known.shape


@pytest.mark.parametrize("name", [FLASH_DSPARK, PRO_DSPARK, "deepseek-ai/DeepSeek-V3.2"])
def test_what_transformers_saves_equals_the_release(tmp_path, name):
    """A model saved again by Transformers, which renames fields, is estimated otherwise."""
    native_config(dict(CONFIGURATIONS[name])).save_pretrained(tmp_path)
    read, known = read_model(str(tmp_path)), read_model(name)
    assert (read.shape, read.quantization) == (known.shape, known.quantization)


def test_a_release_without_drafter_has_none(tmp_path):
    """The MTP-1 module of a preview is taken for a DSpark module."""
    assert read_model(_write(tmp_path, dict(CONFIGURATIONS["deepseek-ai/DeepSeek-V4-Flash"]))).shape.drafter is None


def test_other_names_come_from_the_hub(tmp_path, monkeypatch):
    """A fine-tuned model on the hub cannot be estimated."""
    _write(tmp_path, TINY_V32)
    monkeypatch.setattr(reading, "_download", lambda name: str(tmp_path / "config.json"))
    assert read_model("someone/tiny").shape.num_dense_layers == 1


@pytest.mark.parametrize("name", ["someone/unknown", "absent folder/with spaces"])
def test_unknown_models_are_told(no_network, name):
    """A user reads a traceback, or not which names work offline."""
    with pytest.raises(ValueError, match=r"`MODEL` must be .*known offline.*DeepSeek-V4-Pro, .*\(no network\)"):
        read_model(name)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "configuration cannot be read"), ("[]", "must have a JSON object")]
)
def test_broken_files_are_told(tmp_path, content, message):
    """A user reads a traceback of the JSON parser."""
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        (TINY_V4, {"model_type": "llama"}, "`model_type` must be deepseek_v4 or deepseek_v32, got 'llama'"),
        (TINY_V4, {"head_dim": None}, "`head_dim` must be an integer of at least 1, got None"),
        (TINY_V4, {"vocab_size": -3}, "`vocab_size` must be an integer of at least 1, got -3"),
        (TINY_V4, {"o_groups": 5}, "`o_groups` must divide the 192 outputs"),
        (TINY_V4, {"layer_types": ["full_attention"] * 4}, "`layer_types` must consist of .*, got full_attention"),
        (TINY_V4, {"layer_types": ["sliding_attention"]}, "`layer_types` must name all 4 layers, got 1"),
        (TINY_V4, {"layer_types": None}, "`compress_ratios` must be a list with entries, got nothing"),
        (
            TINY_V4,
            {"layer_types": None, "compress_ratios": [0, 2, 4, [1]]},
            r"`compress_ratios` must consist of 0, 4, 128, got 2, \[1\]",
        ),
        (TINY_V4, {"dspark_block_size": 5}, "`dspark_target_layer_ids` must be a list with entries, got nothing"),
        (TINY_V4, {"mlp_bias": True}, "`mlp_bias` must be false"),
        (TINY_V32, {"quantization_config": {"quant_method": "awq"}}, "must be fp8 or absent, got 'awq'"),
        (TINY_V32, {"first_k_dense_replace": "one"}, "`first_k_dense_replace` must be an integer of at least 0"),
    ],
)
def test_broken_fields_are_told(fields, changes, message):
    """A wrong configuration gives numbers all the same, or a traceback."""
    with pytest.raises(ValueError, match=message):
        model_from_fields("tiny", {**fields, **changes})
