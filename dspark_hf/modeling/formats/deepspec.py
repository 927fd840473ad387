"""Read the released DeepSpec drafters: their configuration, translated to our fields."""

from __future__ import annotations

import os
from typing import Any

from safetensors import safe_open
from transformers.utils.hub import cached_file

from dspark_hf.modeling.formats.tensors import HUB_OPTIONS

_DEEPSPEC_BACKBONES = {"Qwen3DSparkModel": "qwen3", "Gemma4DSparkModel": "gemma4"}


def is_deepspec(fields: dict[str, Any]) -> bool:
    """Return whether `fields` of a `config.json` belong to a DeepSpec drafter."""
    # its `model_type` is the target's: only the architecture tells
    return _deepspec_architecture(fields) is not None


def _deepspec_architecture(fields: dict[str, Any]) -> str | None:
    return next((name for name in fields.get("architectures") or [] if name in _DEEPSPEC_BACKBONES), None)


def read_tensor_shapes(name_or_path: str | os.PathLike, options: dict[str, Any]) -> dict[str, list[int]]:
    """Return the name and shape of every tensor of a drafter folder or hub name, without reading the tensors.

    `options` are those of `from_pretrained`.
    """
    hub_options = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    path = cached_file(name_or_path, "model.safetensors", **hub_options)
    with safe_open(path, framework="pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 (not a dict)


def fields_from_deepspec(fields: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Return `DSparkConfig`'s fields for a DeepSpec drafter.

    Its `config.json` is a deep copy of the target's, so whatever the tensors' shapes tell is taken from them.
    """
    backbone_type = _DEEPSPEC_BACKBONES[str(_deepspec_architecture(fields))]
    is_gemma = backbone_type == "gemma4"
    hidden_size = shapes["norm.weight"][0]
    head_dim = shapes["layers.0.self_attn.q_norm.weight"][0]
    confidence_width = shapes.get("confidence_head.proj.weight", [1, 0])[1]
    return {
        "model_type": "dspark",
        "vocab_size": shapes["embed_tokens.weight"][0],
        "hidden_size": hidden_size,
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": _num_layers(shapes),
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // head_dim,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // head_dim,
        "head_dim": head_dim,
        "hidden_act": fields.get("hidden_act") or fields.get("hidden_activation") or "silu",
        "rms_norm_eps": fields["rms_norm_eps"],
        "rope_parameters": _rope(fields, is_gemma),
        "max_position_embeddings": fields["max_position_embeddings"],
        "attention_bias": "layers.0.self_attn.q_proj.bias" in shapes,
        "attention_k_eq_v": "layers.0.self_attn.v_proj.weight" not in shapes,
        "backbone_type": backbone_type,
        "embed_scale": float(hidden_size) ** 0.5 if is_gemma else 1.0,
        "final_logit_softcapping": fields.get("final_logit_softcapping") if is_gemma else None,
        "owns_embeddings": True,
        "block_size": fields["block_size"],
        "mask_token_id": fields["mask_token_id"],
        "target_layer_ids": fields["target_layer_ids"],
        "num_target_layers": fields["num_target_layers"],
        "markov_rank": shapes.get("markov_head.markov_w1.weight", [0, 0])[1],
        "markov_head_type": _head_type(shapes),
        "enable_confidence_head": confidence_width > 0,
        "confidence_head_with_markov": confidence_width > hidden_size,
        "initializer_range": fields.get("initializer_range", 0.02),
        **{name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype")},
    }


def _num_layers(shapes: dict[str, list[int]]) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith("layers.")})


def _head_type(shapes: dict[str, list[int]]) -> str:
    if "markov_head.joint_proj.weight" in shapes:
        return "rnn"
    return "gated" if "markov_head.gate_proj.weight" in shapes else "vanilla"


def _rope(fields: dict[str, Any], is_gemma: bool) -> dict[str, Any]:
    parameters = fields.get("rope_parameters") or {}
    if is_gemma:
        return dict(parameters["full_attention"])
    # a YaRN or partial rotation in the copied configuration is the target's, not the drafter's
    return {"rope_type": "default", "rope_theta": parameters.get("rope_theta") or fields.get("rope_theta", 10000.0)}
