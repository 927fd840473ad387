"""Configurations by name or from a folder, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dspark_hf.modeling.deepseek_v4.estimation.known import CONFIGURATIONS, DRAFTER_RELEASES
from dspark_hf.modeling.deepseek_v4.estimation.shapes import (
    AttentionKind,
    AttentionLayer,
    DeepseekV4Shape,
    DeepseekV32Shape,
    DrafterShape,
    Model,
    Quantization,
    Shape,
)

MODEL_TYPES = ("deepseek_v4", "deepseek_v32")
KIND_OF_RATIO = {0: AttentionKind.sliding, 4: AttentionKind.csa, 128: AttentionKind.hca}
# names of Transformers' native configuration
KIND_OF_TYPE = {
    "sliding_attention": AttentionKind.sliding,
    "compressed_sparse_attention": AttentionKind.csa,
    "heavily_compressed_attention": AttentionKind.hca,
}


def read_model(name: str) -> Model:
    """Return the model of a known name, a folder, or any other hub name (only then the network is used).

    Raises:
        ValueError: if it has no readable configuration of DeepSeek-V4 or DeepSeek-V3.2.
    """
    if Path(name).exists() or name not in CONFIGURATIONS:
        return model_from_fields(name, _read_fields(name))
    model = model_from_fields(name, CONFIGURATIONS[name])
    release = DRAFTER_RELEASES.get(name)
    if release is None or not isinstance(model.shape, DeepseekV4Shape):
        return model
    shape = replace(model.shape, drafter=_drafter(CONFIGURATIONS[release]))
    return replace(model, shape=shape, drafter_release=release)


def model_from_fields(name: str, fields: Mapping[str, Any]) -> Model:
    """Return the model that the fields of a `config.json` describe.

    Raises:
        ValueError: if a field is missing or breaks a rule.
    """
    model_type = fields.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"`model_type` must be {' or '.join(MODEL_TYPES)}, got {model_type!r} in the configuration of {name}. "
            "Name a DeepSeek-V4 or DeepSeek-V3.2 model."
        )
    for bias in ("attention_bias", "mlp_bias"):
        if fields.get(bias):
            raise ValueError(f"`{bias}` must be false, got {fields[bias]!r}. Biases are not counted.")
    shape: Shape = _v4_shape(fields) if model_type == "deepseek_v4" else _v32_shape(fields)
    return Model(name, shape, _quantization(fields))


def _read_fields(name: str) -> Mapping[str, Any]:
    path = Path(name)
    try:
        if path.is_dir():
            path = path / "config.json"
        elif not path.is_file():
            path = Path(_download(name))
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`MODEL` must be a name known offline, a folder with a config.json or a hub name, got {name!r}, whose "
            f"configuration cannot be read. Known offline: {', '.join(CONFIGURATIONS)}. ({_first_line(error)})"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"`MODEL` must have a JSON object as its configuration, got {path}. Name another.")
    return fields


def _download(name: str) -> str:
    # imported here, so that the known names need neither the hub's client nor its settings
    from huggingface_hub import hf_hub_download

    from dspark_hf.hubs import hub_options

    return hf_hub_download(name, "config.json", **hub_options(name, {}))


def _v4_shape(fields: Mapping[str, Any]) -> DeepseekV4Shape:
    layers = _layers(fields)
    shape = DeepseekV4Shape(
        vocab_size=_size(fields, "vocab_size"),
        hidden_size=_size(fields, "hidden_size"),
        layers=layers,
        num_hash_layers=_num_hash_layers(fields),
        num_attention_heads=_size(fields, "num_attention_heads"),
        head_dim=_size(fields, "head_dim"),
        qk_rope_head_dim=_rope_size(fields),
        q_lora_rank=_size(fields, "q_lora_rank"),
        o_groups=_size(fields, "o_groups"),
        o_lora_rank=_size(fields, "o_lora_rank"),
        sliding_window=_size(fields, "sliding_window"),
        index_n_heads=_size(fields, "index_n_heads"),
        index_head_dim=_size(fields, "index_head_dim"),
        index_topk=_size(fields, "index_topk"),
        moe_intermediate_size=_size(fields, "moe_intermediate_size"),
        n_routed_experts=_size(fields, "n_routed_experts"),
        n_shared_experts=_size(fields, "n_shared_experts"),
        num_experts_per_tok=_size(fields, "num_experts_per_tok"),
        hc_mult=_size(fields, "hc_mult"),
        max_position_embeddings=_size(fields, "max_position_embeddings"),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        drafter=_drafter(fields),
    )
    if (shape.num_attention_heads * shape.head_dim) % shape.o_groups:
        width = shape.num_attention_heads * shape.head_dim
        raise ValueError(f"`o_groups` must divide the {width} outputs of all heads, got {shape.o_groups}. Correct it.")
    return shape


def _v32_shape(fields: Mapping[str, Any]) -> DeepseekV32Shape:
    num_layers = _size(fields, "num_hidden_layers")
    return DeepseekV32Shape(
        vocab_size=_size(fields, "vocab_size"),
        hidden_size=_size(fields, "hidden_size"),
        num_hidden_layers=num_layers,
        num_dense_layers=_num_dense_layers(fields, num_layers),
        num_attention_heads=_size(fields, "num_attention_heads"),
        q_lora_rank=_size(fields, "q_lora_rank"),
        kv_lora_rank=_size(fields, "kv_lora_rank"),
        qk_nope_head_dim=_size(fields, "qk_nope_head_dim"),
        qk_rope_head_dim=_size(fields, "qk_rope_head_dim"),
        v_head_dim=_size(fields, "v_head_dim"),
        index_n_heads=_size(fields, "index_n_heads"),
        index_head_dim=_size(fields, "index_head_dim"),
        index_topk=_size(fields, "index_topk"),
        intermediate_size=_size(fields, "intermediate_size"),
        moe_intermediate_size=_size(fields, "moe_intermediate_size"),
        n_routed_experts=_size(fields, "n_routed_experts"),
        n_shared_experts=_size(fields, "n_shared_experts"),
        num_experts_per_tok=_size(fields, "num_experts_per_tok"),
        max_position_embeddings=_size(fields, "max_position_embeddings"),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


def _layers(fields: Mapping[str, Any]) -> tuple[AttentionLayer, ...]:
    """Return one entry per target layer; what `compress_ratios` lists beyond them belongs to the drafter."""
    num_layers = _size(fields, "num_hidden_layers")
    if fields.get("layer_types") is not None:
        layers = _layers_of_types(_list(fields, "layer_types"), fields.get("compress_rates") or {})
        listed = "layer_types"
    else:
        layers = _layers_of_ratios(_list(fields, "compress_ratios"))
        listed = "compress_ratios"
    if len(layers) < num_layers:
        raise ValueError(f"`{listed}` must name all {num_layers} layers, got {len(layers)}. Complete it.")
    return layers[:num_layers]


def _layers_of_ratios(ratios: list[Any]) -> tuple[AttentionLayer, ...]:
    unknown = sorted({str(ratio) for ratio in ratios if not isinstance(ratio, int) or ratio not in KIND_OF_RATIO})
    if unknown:
        known = ", ".join(map(str, KIND_OF_RATIO))
        raise ValueError(f"`compress_ratios` must consist of {known}, got {', '.join(unknown)}. Correct it.")
    return tuple(AttentionLayer(KIND_OF_RATIO[ratio], ratio) for ratio in ratios)


def _layers_of_types(types: list[str], rates: Mapping[str, int]) -> tuple[AttentionLayer, ...]:
    unknown = sorted({str(one) for one in types} - KIND_OF_TYPE.keys())
    if unknown:
        known = ", ".join(KIND_OF_TYPE)
        raise ValueError(f"`layer_types` must consist of {known}, got {', '.join(unknown)}. Correct it.")
    usual = {kind: ratio for ratio, kind in KIND_OF_RATIO.items()}
    # a plain window has no rate, and its usual one is 0
    return tuple(AttentionLayer(KIND_OF_TYPE[one], rates.get(one, usual[KIND_OF_TYPE[one]])) for one in types)


def _num_hash_layers(fields: Mapping[str, Any]) -> int:
    if fields.get("mlp_layer_types") is not None:
        return list(fields["mlp_layer_types"]).count("hash_moe")
    return min(_size(fields, "num_hash_layers", at_least=0), _size(fields, "num_hidden_layers"))


def _num_dense_layers(fields: Mapping[str, Any], num_layers: int) -> int:
    if fields.get("mlp_layer_types") is not None:
        return list(fields["mlp_layer_types"]).count("dense")
    return min(_size(fields, "first_k_dense_replace", at_least=0), num_layers)


def _rope_size(fields: Mapping[str, Any]) -> int:
    # Transformers saves the share, the releases give the size
    if "qk_rope_head_dim" not in fields and fields.get("partial_rotary_factor") is not None:
        return int(_size(fields, "head_dim") * fields["partial_rotary_factor"])
    return _size(fields, "qk_rope_head_dim")


def _drafter(fields: Mapping[str, Any]) -> DrafterShape | None:
    if not any(key.startswith("dspark_") for key in fields):
        return None
    num_tapped = len(_list(fields, "dspark_target_layer_ids"))
    beyond = len(fields.get("compress_ratios") or ()) - _size(fields, "num_hidden_layers")
    return DrafterShape(
        # a configuration that Transformers saved no longer lists the stages: there is one per tapped layer
        num_stages=beyond if beyond > 0 else num_tapped,
        num_tapped_layers=num_tapped,
        markov_rank=_size(fields, "dspark_markov_rank"),
        block_size=_size(fields, "dspark_block_size"),
    )


def _quantization(fields: Mapping[str, Any]) -> Quantization:
    described = fields.get("quantization_config")
    if not described:
        return Quantization(linear="bf16", expert="bf16", fp8_scale_bytes=4)
    method = described.get("quant_method") if isinstance(described, dict) else described
    if method != "fp8":
        raise ValueError(
            f"`quantization_config.quant_method` must be fp8 or absent, got {method!r}. "
            "Estimate the release it was made from, with --dtype int8 or int4."
        )
    # Transformers moves the experts' format into the quantization's settings
    has_fp4_experts = "fp4" in (fields.get("expert_dtype"), described.get("expert_dtype"))
    # scales are E8M0 in the releases with FP4 experts, F32 in the others
    return Quantization("fp8", "fp4" if has_fp4_experts else "fp8", fp8_scale_bytes=1 if has_fp4_experts else 4)


def _size(fields: Mapping[str, Any], key: str, at_least: int = 1) -> int:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        got = "nothing" if key not in fields else repr(value)
        raise ValueError(f"`{key}` must be an integer of at least {at_least}, got {got}. Correct the configuration.")
    return value


def _list(fields: Mapping[str, Any], key: str) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, list) or not value:
        got = "nothing" if key not in fields else repr(value)
        raise ValueError(f"`{key}` must be a list with entries, got {got}. Correct the configuration.")
    return value


def _first_line(error: BaseException) -> str:
    # not that of `damage`: estimates load nothing heavy
    return (str(error).splitlines() or [""])[0]
