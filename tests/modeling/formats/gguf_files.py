"""GGUF files of drafters, written from the layout that llama.cpp reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.modeling.deepspec_layout import BLOCK_SIZE, TARGET_LAYER_IDS, VOCAB_SIZE

gguf = pytest.importorskip("gguf")

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


def write_gguf(
    path: Path,
    tensors: dict[str, Tensor],
    changes: dict[str, Any] | None = None,
    kind_of: Callable[[str], str] = lambda name: "F32",
    architecture: str = "dflash",
) -> Path:
    """Write a file with a drafter's `tensors` under their names there, quantised as `kind_of` says."""
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
