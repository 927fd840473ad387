"""Layouts with a `dflash_config`: SpecForge's, LiquidAI's of it for LFM2, and z-lab's own of DFlash.

They carry no vocabulary: the target's embedding and head are to be borrowed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dspark_hf.modeling.formats.reading import (
    Packaging,
    Shapes,
    check_context_width,
    check_full_attention,
    common_fields,
    find_key,
    need_key,
    rope_fields,
)


def _has_architecture(fields: dict[str, Any], *names: str) -> bool:
    # speculators uses the same names
    given = None if "speculators_model_type" in fields else fields.get("architectures")
    return isinstance(given, list) and any(name in given for name in names)


def _translator(packaging: str, *, samples_from_anchor: bool, is_bare: bool) -> Callable[..., dict[str, Any]]:
    def translate(fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
        common = common_fields(fields, shapes, packaging)
        check_full_attention(fields, common["num_hidden_layers"], packaging)
        given = find_key(fields, "sample_from_anchor")
        drafts_at_anchor = samples_from_anchor if given is None else given
        size = need_key(fields, "block_size", packaging)
        translated = {
            **common,
            "rope_parameters": rope_fields(fields),
            # of Transformers' kinds of rotation, LFM2's drafters alone turn neighbours
            "rope_interleaved": fields.get("rope_is_neox_style") is False,
            "borrows_bare_weights": is_bare,
            # a file's block is its slots
            "block_size": size if drafts_at_anchor or not isinstance(size, int) else size - 1,
            "sample_from_anchor": drafts_at_anchor,
            "num_target_layers": find_key(fields, "num_target_layers"),
            "sts_temperatures": find_key(fields, "sts_temperatures"),
            "accept_rates": find_key(fields, "accept_rates"),
            **{key: need_key(fields, key, packaging) for key in ("mask_token_id", "target_layer_ids")},
        }
        check_context_width(translated, shapes, packaging)
        return translated

    return translate


SPECFORGE = Packaging(
    "SpecForge",
    lambda fields: _has_architecture(fields, "DSparkDraftModel"),
    _translator("SpecForge", samples_from_anchor=True, is_bare=True),
)
LFM2 = Packaging(
    "LiquidAI",
    lambda fields: _has_architecture(fields, "Lfm2DSparkDraftModel"),
    _translator("LiquidAI", samples_from_anchor=True, is_bare=True),
)
DFLASH = Packaging(
    "z-lab",
    lambda fields: _has_architecture(fields, "DFlashDraftModel"),
    # its code calls the target's own modules, which scale
    _translator("z-lab", samples_from_anchor=False, is_bare=False),
)
