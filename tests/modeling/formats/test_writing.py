"""Drafters written in the layouts of other projects keep their numbers, and hold what servers ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from dspark_hf import DSparkAssistantModel
from dspark_hf.cli.main import app
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.formats.writing import LAYOUTS, export
from tests.modeling.deepspec_layout import Layout, deepspec_fields, deepspec_weights
from tests.modeling.drafting import draft_greedily
from tests.modeling.formats.layouts import (
    DRAFT_IDS,
    reduced,
    specforge_fields,
    speculators_fields,
    without_vocabulary,
    write,
)
from tests.thinning import mostly_slow
from tests.tiny import tiny_target

WEIGHTS = deepspec_weights(Layout())
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "use_sliding_window": True}
_BF16 = Layout(dtype=torch.bfloat16)
_GEMMA = Layout("gemma4", "rnn", attention_k_eq_v=True)
FOLDERS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "DeepSpec": ("deepspec", deepspec_fields(Layout()), WEIGHTS),
    "DeepSpec Gemma 4": ("deepspec", deepspec_fields(_GEMMA), deepspec_weights(_GEMMA)),
    "DeepSpec bf16": ("deepspec", deepspec_fields(_BF16), deepspec_weights(_BF16)),
    "speculators": ("speculators", speculators_fields(), without_vocabulary(WEIGHTS)),
    "speculators, other slots": (
        "speculators",
        speculators_fields(sample_from_anchor=False),
        without_vocabulary(WEIGHTS),
    ),
    "speculators, sliding": ("speculators", speculators_fields(layers=_SLIDING), without_vocabulary(WEIGHTS)),
    "speculators, reduced": ("speculators", speculators_fields(len(DRAFT_IDS)), reduced(WEIGHTS)),
    "SpecForge": ("specforge", specforge_fields(), without_vocabulary(WEIGHTS)),
}


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        FOLDERS, ("DeepSpec", "DeepSpec Gemma 4", "speculators, other slots", "speculators, reduced", "SpecForge")
    ),
)
def test_a_round_trip_is_bit_exact(name: str, tmp_path: Path) -> None:
    """Reading a drafter and writing it again would lose, rename or round tensors, or change what it means."""
    layout, fields, weights = FOLDERS[name]
    drafter = DSparkAssistantModel.from_pretrained(write(tmp_path / "given", fields, weights), dtype="auto")
    export(drafter, layout, tmp_path / "written")
    written = load_file(tmp_path / "written" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[key], weights[key]) and written[key].dtype == weights[key].dtype for key in weights)
    again = DSparkAssistantModel.from_pretrained(tmp_path / "written")
    kept, expected = again.config.to_dict(), drafter.config.to_dict()
    for one in (kept, expected):
        del one["_name_or_path"]
    assert kept == expected


def _trained(**options: Any) -> tuple[DSparkAssistantModel, TargetAdapter]:
    target = tiny_target("qwen3")
    drafter = DSparkAssistantModel.from_target(
        target, num_hidden_layers=1, markov_rank=4, block_size=3, initializer_range=0.3, **options
    )
    return drafter, TargetAdapter(target, drafter.target_layer_ids)


@pytest.mark.parametrize("options", [{}, {"draft_token_ids": range(5, 30), "markov_over_draft_vocab": True}])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "custom_generate"])
def test_our_drafters_draft_the_same_in_any_layout(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A drafter that borrows from its target would be written without what servers need, or draft otherwise."""
    drafter, target = _trained(**options)
    with pytest.raises(ValueError, match="`target` must be given for a drafter that borrows"):
        export(drafter, layout, tmp_path)
    export(drafter, layout, tmp_path, target)
    again = DSparkAssistantModel.from_pretrained(tmp_path)
    assert again.config.target_fingerprint == drafter.config.target_fingerprint
    context = torch.randn(1, 5, 32 * len(drafter.target_layer_ids))
    expected, block = (draft_greedily(one, target, context, [5], [8]) for one in (drafter, again))
    torch.testing.assert_close(block.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(block.confidence, expected.confidence, atol=1e-5, rtol=0)
    _check_servers_rules(tmp_path, layout)


def _check_servers_rules(folder: Path, layout: str) -> None:
    """Check what vLLM and SGLang ask of a drafter's names and keys."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = set(load_file(folder / "model.safetensors"))
    heads = {"embed_tokens", "lm_head", "fc", "hidden_norm", "norm", "layers", "markov_head", "confidence_head"}
    assert {name.split(".")[0] for name in names} <= heads | {"d2t", "t2d"}
    assert "auto_map" not in fields
    architecture = {"deepspec": "Qwen3DSparkModel"}.get(layout, "DSparkDraftModel")
    assert fields["architectures"] == [architecture]
    nested = fields["dflash_config"] if layout == "specforge" else fields
    layers = fields["transformer_layer_config"] if layout == "speculators" else fields
    assert layers["model_type"] == "qwen3"
    assert 0 <= nested["mask_token_id"] < layers["vocab_size"]
    assert nested["markov_head_type"] in ("vanilla", "gated", "rnn")
    if layout == "speculators":
        assert fields["speculators_model_type"] == "dspark"
        assert fields["sample_from_anchor"] is True
        assert min(fields["aux_hidden_state_layer_ids"]) >= 0
    # fewer tokens than the target has need a map and a head of their own
    if "d2t" in names:
        assert "lm_head.weight" in names
        assert fields["draft_vocab_size"] < layers["vocab_size"]
    if layout == "deepspec":
        assert {"embed_tokens.weight", "lm_head.weight"} <= names


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("deepspec", {"use_qk_norm": False}, "`use_qk_norm` must be true"),
        ("deepspec", {"context_window": 8}, "`context_window` must be None in deepspec's layout, got 8"),
        ("specforge", {"sample_from_anchor": False}, "`sample_from_anchor` must be true in specforge's layout"),
        ("speculators", {"rope_interleaved": True}, "`rope_interleaved` must be false"),
        ("speculators", {"backbone_type": "gemma3"}, "`backbone_type` must be 'qwen3', or for DeepSpec 'gemma4'"),
        ("gguf", {}, "`layout` must be one of"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(
    layout: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A server would draft otherwise than the drafter was trained to: right text, no speed."""
    drafter, target = _trained(**options)
    with pytest.raises(ValueError, match=message):
        export(drafter, layout, tmp_path / "new", target)
    assert not (tmp_path / "new").exists()


def test_targets_that_scale_are_refused(tmp_path: Path) -> None:
    """Servers would lend a drafter the bare matrices of a target that scales them."""
    target = tiny_target("gemma3_text")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    with pytest.raises(ValueError, match="`target` must neither scale its embedding nor scale or cap its logits"):
        export(drafter, "speculators", tmp_path, TargetAdapter(target))


def test_the_command_writes_a_folder(tmp_path: Path) -> None:
    """The command does not do what its help says, or writes over a folder."""
    given = write(tmp_path / "given", deepspec_fields(Layout()), WEIGHTS)
    arguments = ["export", str(given), "--to", "speculators", "--output", str(tmp_path / "new")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "500", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert DSparkAssistantModel.from_pretrained(tmp_path / "new").block_size == 5
    again = CliRunner().invoke(app, arguments, env={"COLUMNS": "500", "NO_COLOR": "1"})
    assert again.exit_code == 2
    assert "`--output` must be absent or empty" in again.output
