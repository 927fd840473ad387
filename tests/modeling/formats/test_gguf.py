"""Drafters in llama.cpp's GGUF files draft what their tensors do elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_hf import DSparkAssistantModel, DSparkConfig
from dspark_hf.loading import load_drafter, read_drafter_config
from tests.modeling.deepspec_layout import BLOCK_SIZE, TARGET_LAYER_IDS, Layout, deepspec_weights
from tests.modeling.drafting import draft_greedily
from tests.modeling.formats.gguf_files import write_gguf
from tests.modeling.formats.layouts import DRAFT_IDS, lending_target, reduced, without_vocabulary
from tests.modeling.formats.test_packagings import ANCHOR, LENGTH, TOLERANCE, _check, _context, _oracle

gguf = pytest.importorskip("gguf")

WEIGHTS = deepspec_weights(Layout())


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_file_drafts_what_its_tensors_do(is_whole: bool, tmp_path: Path) -> None:
    """A drafter that llama.cpp runs would not load, or draft otherwise: a name, a tap or a slot is off."""
    tensors = WEIGHTS if is_whole else without_vocabulary(WEIGHTS)
    path = write_gguf(tmp_path / "drafter.gguf", tensors)
    assert DSparkConfig.from_pretrained(path).target_layer_ids == TARGET_LAYER_IDS
    _check(path, _oracle(), WEIGHTS)
    saved = DSparkAssistantModel.from_pretrained(tmp_path, gguf_file="drafter.gguf").state_dict()
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    # the commands take a file too
    assert read_drafter_config(str(path)).block_size == load_drafter(str(path)).block_size == BLOCK_SIZE


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantised_tensors_become_plain(kind: str, tmp_path: Path) -> None:
    """A quantised drafter would be refused, or read as other numbers than it holds."""

    def kind_of(name: str) -> str:
        # blocks are 32 numbers long
        return kind if kind in ("F16", "BF16") or WEIGHTS[name].shape[-1] % 32 == 0 else "F32"

    path = write_gguf(tmp_path / "drafter.gguf", WEIGHTS, kind_of=kind_of)
    drafter = DSparkAssistantModel.from_pretrained(path, dtype=torch.float32)
    # scales are rounded too
    steps = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 240, "Q4_0": 1 / 8}
    for name, saved in drafter.state_dict().items():
        weight = WEIGHTS[name]
        largest = float(weight.abs().max())
        torch.testing.assert_close(saved, weight, atol=1.01 * steps[kind] * largest, rtol=0, msg=name)
        stored = gguf.GGMLQuantizationType[kind_of(name) if weight.ndim > 1 else "F32"]
        plain = gguf.dequantize(gguf.quants.quantize(weight.numpy(), stored), stored)
        assert torch.equal(saved, torch.from_numpy(plain.copy()).reshape(weight.shape)), name
    expected = torch.float16 if kind == "F16" else torch.bfloat16
    assert DSparkAssistantModel.from_pretrained(path).dtype == expected


def test_a_reduced_vocabulary_is_named_by_ids(tmp_path: Path) -> None:
    """Drafts would be other tokens: the map holds ids there, and how far they are off elsewhere."""
    tensors = reduced(WEIGHTS)
    path = write_gguf(tmp_path / "drafter.gguf", tensors)
    drafter = DSparkAssistantModel.from_pretrained(path)
    assert drafter.draft_token_ids.tolist() == DRAFT_IDS
    oracle = _oracle(weights={**tensors, "embed_tokens.weight": WEIGHTS["embed_tokens.weight"]})
    _check(path, oracle, WEIGHTS, DRAFT_IDS)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_block_of_dflash_drafts_nothing_at_its_anchor(says_so: bool, tmp_path: Path) -> None:
    """Drafters without a Markov head would draft every token one place late."""
    weights = deepspec_weights(Layout(markov_head_type=None, confidence="none"))
    changes = {"sample_from_anchor": False if says_so else None}
    drafter = DSparkAssistantModel.from_pretrained(write_gguf(tmp_path / "drafter.gguf", weights, changes))
    oracle = _oracle(weights=weights)
    oracle.num_dead_slots = 1
    block = draft_greedily(drafter, lending_target(weights), _context(), [LENGTH], [ANCHOR])
    expected = oracle.block(_context()[0], list(range(LENGTH)), ANCHOR, LENGTH)
    torch.testing.assert_close(block.logits[0].double(), expected.logits, atol=TOLERANCE, rtol=0)


def test_its_rotation_is_read(tmp_path: Path) -> None:
    """A scaled or partial rotation would be taken for a plain and whole one."""
    changes = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 128,
        "rope.dimension_count": 4,
    }
    config = DSparkConfig.from_pretrained(write_gguf(tmp_path / "drafter.gguf", WEIGHTS, changes))
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.sliding_window": 8}, "not known to mean the same, got .*`dflash.attention.sliding_window`"),
        ({"markov_head_type": "rnn"}, "must have a vanilla Markov head, got .*'rnn'"),
        ({"target_layers": None}, "must say `target_layers`"),
        ({"rope.scaling.type": "longrope"}, "`rope_parameters` must have a `rope_type` of"),
    ],
)
def test_what_is_not_read_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A file that asks for more than the drafter can do would draft badly without a word."""
    path = write_gguf(tmp_path / "drafter.gguf", WEIGHTS, changes)
    with pytest.raises(ValueError, match=message):
        DSparkAssistantModel.from_pretrained(path)


def test_other_files_are_named(tmp_path: Path) -> None:
    """A target's GGUF, a cut download or a slip in the name would end in an error of another library."""
    path = write_gguf(tmp_path / "llama.gguf", WEIGHTS, architecture="llama")
    with pytest.raises(ValueError, match="must hold a drafter of the architecture dflash or dspark, got .*'llama'"):
        DSparkAssistantModel.from_pretrained(path)
    extra = {**WEIGHTS, "selector_hidden.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="must hold a drafter's tensors alone, got .*'selector_hidden.weight'"):
        DSparkAssistantModel.from_pretrained(write_gguf(tmp_path / "second.gguf", extra))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(path.read_bytes().replace(b"llama", b"l\xffama", 1))
    with pytest.raises(ValueError, match="must say `general.architecture` in words, got .*a damaged one"):
        DSparkAssistantModel.from_pretrained(damaged)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="must hold a whole GGUF file, got .*cut.gguf"):
        DSparkAssistantModel.from_pretrained(cut)
    with pytest.raises(ValueError, match="`gguf_file` must be a file of .*, got 'no.gguf'"):
        DSparkAssistantModel.from_pretrained(tmp_path, gguf_file="no.gguf")
