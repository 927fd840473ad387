"""Write random drafters in the layouts of other projects, with the tensors of a DeepSpec one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.modeling.deepspec_layout import (
    BLOCK_SIZE,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_LAYERS,
    TARGET_LAYER_IDS,
    VOCAB_SIZE,
    Layout,
    deepspec_fields,
)
from tests.tiny import tiny_target

VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
DRAFT_IDS = [2, 3, 5, 11, 12, 30, 47]


def write(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write a folder with a `config.json` and one file of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def without_vocabulary(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a drafter's tensors without those that it shares with its target."""
    return {name: x for name, x in tensors.items() if name not in VOCABULARY}


def reduced(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a drafter's tensors with a head of its own over `DRAFT_IDS`, as speculators writes it."""
    kept = {name: x for name, x in tensors.items() if name != "embed_tokens.weight"}
    for name in ("lm_head.weight", "markov_head.markov_w2.weight"):
        if name in kept:
            kept[name] = kept[name][DRAFT_IDS]
    marked = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    marked[DRAFT_IDS] = True
    return {**kept, "d2t": torch.tensor(DRAFT_IDS) - torch.arange(len(DRAFT_IDS)), "t2d": marked}


def speculators_fields(draft_vocab_size: int = VOCAB_SIZE, **changes: Any) -> dict[str, Any]:
    """Return the `config.json` that speculators 0.9 writes, which leaves out what Qwen 3 has as a default."""
    return {
        "architectures": ["DSparkDraftModel"],
        "auto_map": {"": "config.DSparkSpeculatorConfig"},
        "aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in TARGET_LAYER_IDS],
        "block_size": BLOCK_SIZE,
        "confidence_head_with_markov": True,
        "draft_vocab_size": draft_vocab_size,
        "dtype": "float32",
        "enable_confidence_head": True,
        "markov_head_type": "vanilla",
        "markov_rank": 6,
        "mask_token_id": 4,
        "sample_from_anchor": True,
        "sliding_window_non_causal": False,
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": BLOCK_SIZE}],
            "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": "someone/a-target"},
        },
        "speculators_model_type": "dspark",
        "speculators_version": "0.9.0",
        "tie_word_embeddings": False,
        "transformer_layer_config": {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "head_dim": 8,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": INTERMEDIATE_SIZE,
            "layer_types": ["full_attention"] * NUM_LAYERS,
            "max_position_embeddings": 512,
            "model_type": "qwen3",
            "num_attention_heads": 4,
            "num_hidden_layers": NUM_LAYERS,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
            "vocab_size": VOCAB_SIZE,
            **changes.pop("layers", {}),
        },
        **changes,
    }


def specforge_fields(architecture: str = "DSparkDraftModel", **changes: Any) -> dict[str, Any]:
    """Return the `config.json` of SpecForge, or of its kin at LiquidAI and z-lab."""
    fields = deepspec_fields(Layout())
    heads = {name: fields.pop(name) for name in ("markov_rank", "markov_head_type", "enable_confidence_head")}
    nested = {name: fields.pop(name) for name in ("mask_token_id", "target_layer_ids")}
    return {
        **fields,
        "architectures": [architecture],
        "auto_map": {"AutoModel": f"dspark.{architecture}"},
        "dflash_config": {"projector_type": "dspark", **heads, **nested, **changes.pop("dflash_config", {})},
        **changes,
    }


def lending_target(tensors: dict[str, Tensor]) -> TargetAdapter:
    """Return a target whose embedding and head are those of a drafter's tensors."""
    model = tiny_target("qwen3", vocab_size=VOCAB_SIZE, num_hidden_layers=6)
    model.get_input_embeddings().weight = nn.Parameter(tensors["embed_tokens.weight"].clone())
    model.get_output_embeddings().weight = nn.Parameter(tensors["lm_head.weight"].clone())
    return TargetAdapter(model, TARGET_LAYER_IDS)
