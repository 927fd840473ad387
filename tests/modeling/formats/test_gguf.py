"""Drafters in llama.cpp's GGUF files draft what their tensors do elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dspark_hf import DSparkAssistantModel, DSparkConfig
from dspark_hf.loading import load_drafter, read_drafter_config
from tests.modeling.deepspec_layout import BLOCK_SIZE, TARGET_LAYER_IDS, VOCAB_SIZE, Layout, deepspec_weights
from tests.modeling.drafting import draft_greedily
from tests.modeling.formats.layouts import DRAFT_IDS, lending_target, reduced, without_vocabulary
from tests.modeling.formats.test_packagings import ANCHOR, LENGTH, TOLERANCE, _check, _context, _oracle

gguf = pytest.importorskip("gguf")

WEIGHTS = deepspec_weights(Layout())
_NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "hidden_norm": "enc.output_norm",
    "norm": "output_norm",
    "markov_head.markov_w1": "markov_w1",
    "markov_head.markov_w2": "markov_w2",
    "confidence_head.proj": "conf_proj",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FIELDS: dict[str, Any] = {
    "block_count": 2,
    "block_size": BLOCK_SIZE,
    "context_length": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1e6,
    "rope.dimension_count": 8,
    # a layer's input there
    "target_layers": [layer_id + 1 for layer_id in TARGET_LAYER_IDS],
    "sample_from_anchor": True,
}


def _their_name(name: str) -> str:
    if name == "d2t":
        return name
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("layers."):
        return f"{_NAMES.get(stem, stem)}.{kind}"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{_NAMES[part]}.{kind}"


def _write(
    path: Path,
    tensors: dict[str, Tensor],
    changes: dict[str, Any] | None = None,
    kind_of: Callable[[str], str] = lambda name: "F32",
    architecture: str = "dflash",
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**FIELDS, **(changes or {})}.items():
        add: dict[type, Callable[..., None]] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        if value is not None:
            add[type(value)](f"{architecture}.{name}", value)
    writer.add_mask_token_id(4)
    writer.add_token_list([f"token{i}" for i in range(VOCAB_SIZE)])
    for name, tensor in tensors.items():
        if name == "t2d":
            continue
        if name == "d2t":
            writer.add_tensor(name, (tensor + torch.arange(len(tensor))).numpy())
            continue
        values = tensor.numpy().astype(np.float32)
        kind = gguf.GGMLQuantizationType[kind_of(name) if values.ndim > 1 else "F32"]
        writer.add_tensor(_their_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_file_drafts_what_its_tensors_do(is_whole: bool, tmp_path: Path) -> None:
    """A drafter that llama.cpp runs would not load, or draft otherwise: a name, a tap or a slot is off."""
    tensors = WEIGHTS if is_whole else without_vocabulary(WEIGHTS)
    path = _write(tmp_path / "drafter.gguf", tensors)
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

    path = _write(tmp_path / "drafter.gguf", WEIGHTS, kind_of=kind_of)
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
    path = _write(tmp_path / "drafter.gguf", tensors)
    drafter = DSparkAssistantModel.from_pretrained(path)
    assert drafter.draft_token_ids.tolist() == DRAFT_IDS
    oracle = _oracle(weights={**tensors, "embed_tokens.weight": WEIGHTS["embed_tokens.weight"]})
    _check(path, oracle, WEIGHTS, DRAFT_IDS)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_block_of_dflash_drafts_nothing_at_its_anchor(says_so: bool, tmp_path: Path) -> None:
    """Drafters without a Markov head would draft every token one place late."""
    weights = deepspec_weights(Layout(markov_head_type=None, confidence="none"))
    changes = {"sample_from_anchor": False if says_so else None}
    drafter = DSparkAssistantModel.from_pretrained(_write(tmp_path / "drafter.gguf", weights, changes))
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
    config = DSparkConfig.from_pretrained(_write(tmp_path / "drafter.gguf", WEIGHTS, changes))
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
    path = _write(tmp_path / "drafter.gguf", WEIGHTS, changes)
    with pytest.raises(ValueError, match=message):
        DSparkAssistantModel.from_pretrained(path)


def test_other_files_are_named(tmp_path: Path) -> None:
    """A target's GGUF, a cut download or a slip in the name would end in an error of another library."""
    path = _write(tmp_path / "llama.gguf", WEIGHTS, architecture="llama")
    with pytest.raises(ValueError, match="must hold a drafter of the architecture dflash or dspark, got .*'llama'"):
        DSparkAssistantModel.from_pretrained(path)
    extra = {**WEIGHTS, "selector_hidden.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="must hold a drafter's tensors alone, got .*'selector_hidden.weight'"):
        DSparkAssistantModel.from_pretrained(_write(tmp_path / "second.gguf", extra))
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
