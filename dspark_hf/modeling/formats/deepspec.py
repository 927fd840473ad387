"""DeepSpec's layout: a configuration copied from the target's, tensors without a prefix."""

from __future__ import annotations

from typing import Any

from dspark_hf.modeling.formats.reading import (
    Packaging,
    Shapes,
    Unreadable,
    check_context_width,
    check_full_attention,
    common_fields,
    find_key,
    need_key,
    rope_fields,
)

NAME = "DeepSpec"
# SpecForge's own normalisation for SGLang writes these names too, and leaves the vocabulary's tensors out
_BACKBONES = {"Qwen3DSparkModel": "qwen3", "Gemma4DSparkModel": "gemma4"}


def _recognises(fields: dict[str, Any]) -> bool:
    # its `model_type` is the target's: only the architecture tells
    return _architecture(fields) is not None


def _architecture(fields: dict[str, Any]) -> str | None:
    names = fields.get("architectures")
    return next((name for name in names if name in _BACKBONES), None) if isinstance(names, list) else None


def _translate(fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Return `DSparkConfig`'s fields. The configuration is a copy of the target's: shapes go before its fields."""
    is_gemma = _BACKBONES[str(_architecture(fields))] == "gemma4"
    common = common_fields(fields, shapes, NAME)
    check_full_attention(fields, common["num_hidden_layers"], NAME)
    if is_gemma and not common["owns_embeddings"]:
        raise Unreadable("hold 'embed_tokens.weight'", "a drafter in the layout of DeepSpec for Gemma 4 without")
    translated = {
        **common,
        "backbone_type": "gemma4" if is_gemma else "qwen3",
        "rope_parameters": _gemma_rope(fields) if is_gemma else rope_fields(fields),
        "embed_scale": float(common["hidden_size"]) ** 0.5 if is_gemma else 1.0,
        "final_logit_softcapping": fields.get("final_logit_softcapping") if is_gemma else None,
        "borrows_bare_weights": True,
        "num_target_layers": find_key(fields, "num_target_layers"),
        "sts_temperatures": find_key(fields, "sts_temperatures"),
        "accept_rates": find_key(fields, "accept_rates"),
        **{key: need_key(fields, key, NAME) for key in ("block_size", "mask_token_id", "target_layer_ids")},
    }
    check_context_width(translated, shapes, NAME)
    return translated


def _gemma_rope(fields: dict[str, Any]) -> dict[str, Any]:
    parameters = fields.get("rope_parameters")
    parameters = parameters.get("full_attention") if isinstance(parameters, dict) else None
    if not isinstance(parameters, dict):
        raise Unreadable("say `rope_parameters` of full attention", "a drafter in DeepSpec's Gemma 4 layout without")
    return dict(parameters)


DEEPSPEC = Packaging(NAME, _recognises, _translate)
