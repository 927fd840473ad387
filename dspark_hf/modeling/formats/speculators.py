"""speculators' layout: the layers' configuration nested, ids of tapped layers counted from the embedding."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from dspark_hf.modeling.formats.reading import (
    Packaging,
    Shapes,
    Unreadable,
    check_context_width,
    common_fields,
    rope_fields,
)

NAME = "speculators"
_KINDS = ("dspark", "dflash")


def _recognises(fields: dict[str, Any]) -> bool:
    return fields.get("speculators_model_type") in _KINDS


def _translate(fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    layers = _layer_fields(fields)
    common = common_fields(layers, shapes, NAME)
    # files without the field were written before the anchor's slot could draft
    drafts_at_anchor = fields.get("sample_from_anchor", False)
    translated = {
        **common,
        "rope_parameters": rope_fields(layers),
        "borrows_bare_weights": True,
        "block_size": _block_size(fields, drafts_at_anchor),
        "sample_from_anchor": drafts_at_anchor,
        "mask_token_id": _need(fields, "mask_token_id"),
        "target_layer_ids": _layer_ids(fields),
        "sts_temperatures": fields.get("sts_temperatures"),
        "accept_rates": fields.get("accept_rates"),
        "num_target_layers": fields.get("num_target_layers"),
        "base_model_name_or_path": _target_name(fields),
        "target_fingerprint": fields.get("target_fingerprint"),
        "dtype": fields.get("dtype") or fields.get("torch_dtype") or common["dtype"],
        **_sliding(fields, layers, common["num_hidden_layers"]),
    }
    check_context_width(translated, shapes, NAME)
    return translated


def _need(fields: dict[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise Unreadable(f"say `{name}` in its configuration", f"a drafter in the layout of {NAME} without")
    return fields[name]


def _layer_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the layers' configuration whole: the file leaves out what its class has as a default."""
    given = _need(fields, "transformer_layer_config")
    kind = given.get("model_type", "qwen3") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise Unreadable("describe its layers by a model type that Transformers knows", repr(kind))
    return CONFIG_MAPPING[kind](**{name: value for name, value in given.items() if name != "model_type"}).to_dict()


def _block_size(fields: dict[str, Any], drafts_at_anchor: Any) -> Any:
    size = _need(fields, "block_size")
    return size if drafts_at_anchor or not isinstance(size, int) else size - 1


def _layer_ids(fields: dict[str, Any]) -> Any:
    ids = _need(fields, "aux_hidden_state_layer_ids")
    if not isinstance(ids, list) or not all(isinstance(layer_id, int) for layer_id in ids):
        raise Unreadable("say `aux_hidden_state_layer_ids` as a list of integers", repr(ids))
    # 0 is the embedding there, -1 here
    return [layer_id - 1 for layer_id in ids]


def _target_name(fields: dict[str, Any]) -> str | None:
    config = fields.get("speculators_config")
    verifier = config.get("verifier") if isinstance(config, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return name if isinstance(name, str) else None


def _sliding(fields: dict[str, Any], layers: dict[str, Any], num_layers: int) -> dict[str, Any]:
    types = layers.get("layer_types") or []
    sliding = [layer for layer, kind in enumerate(types[:num_layers]) if kind == "sliding_attention"]
    if not sliding:
        return {}
    window = layers.get("sliding_window")
    if window is None:
        raise Unreadable("say `sliding_window` for its sliding layers", f"a drafter in the layout of {NAME} without")
    return {
        "context_window": window,
        "sliding_layers": None if len(sliding) == num_layers else sliding,
        "has_causal_sliding_layers": not fields.get("sliding_window_non_causal", False),
    }


SPECULATORS = Packaging(NAME, _recognises, _translate)
