"""Check the kind, the finiteness and the bounds of a drafter's fields, before anything is built of them.

A `config.json` may hold anything: a relation between two fields is only asked for once each of them is what it says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.activations import ACT2FN

BACKBONE_TYPES = ("qwen3", "gemma3", "gemma4", "deepseek_v4")
MARKOV_HEAD_TYPES = ("vanilla", "gated", "rnn")
# far above every drafter there is, and low enough that a wrong number does not ask for terabytes
_MOST_LAYERS = 1024
_WIDEST = 2**20
_LARGEST_VOCABULARY = 2**24
_LONGEST_CONTEXT = 2**31
_LARGEST_BLOCK = 1024

# fields that are integers, each within its bounds; None is what a field may be left at
_INTEGERS: Mapping[str, tuple[int, int]] = {
    "vocab_size": (1, _LARGEST_VOCABULARY),
    "hidden_size": (1, _WIDEST),
    "intermediate_size": (1, _WIDEST),
    "num_hidden_layers": (1, _MOST_LAYERS),
    "num_attention_heads": (1, _WIDEST),
    "num_key_value_heads": (1, _WIDEST),
    "head_dim": (1, _WIDEST),
    "max_position_embeddings": (1, _LONGEST_CONTEXT),
    "context_window": (1, _LONGEST_CONTEXT),
    "block_size": (1, _LARGEST_BLOCK),
    "num_target_layers": (1, _MOST_LAYERS),
    "markov_rank": (0, _WIDEST),
    "markov_top_k": (0, _LARGEST_VOCABULARY),
}
_FLAGS = (
    "attention_bias",
    "use_qk_norm",
    "attention_k_eq_v",
    "owns_embeddings",
    "owns_head",
    "borrows_bare_weights",
    "rope_interleaved",
    "has_causal_sliding_layers",
    "sample_from_anchor",
    "markov_over_draft_vocab",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "confidence_head_bias",
)
# fields that are real numbers, and whether zero is one of them
_NUMBERS: Mapping[str, bool] = {"rms_norm_eps": True, "embed_scale": False, "initializer_range": True}
_CHOICES: Mapping[str, Sequence[str]] = {"backbone_type": BACKBONE_TYPES, "markov_head_type": MARKOV_HEAD_TYPES}
_HINTS: Mapping[str, str] = {
    "context_window": ", or None for the whole context",
    "markov_rank": " (0 means no Markov head)",
    "markov_top_k": ", or None (0 means all tokens)",
    "block_size": " (drafts per round)",
}
_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "proportional")
# what a rotation of a type cannot do without, and what else may be in it
_ROPE_NEEDS: Mapping[str, Sequence[str]] = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_ROPE_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor")
_OPTIONAL = (
    "owns_head",
    "context_window",
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "num_target_layers",
    "markov_top_k",
)


def check_kinds(fields: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names the first of `fields` which is not of its kind, not finite or out of bounds."""
    for name, (lowest, highest) in _INTEGERS.items():
        value = fields[name]
        if not (value is None and name in _OPTIONAL):
            is_right = is_integer(value) and lowest <= value <= highest
            require(is_right, name, f"be an integer in [{lowest}, {highest}]{_HINTS.get(name, '')}", value)
    for name in _FLAGS:
        is_right = isinstance(fields[name], bool) or (fields[name] is None and name in _OPTIONAL)
        require(is_right, name, "be true or false", fields[name])
    for name, allows_zero in _NUMBERS.items():
        value = fields[name]
        is_right = is_finite(value) and (value >= 0 if allows_zero else value > 0)
        require(is_right, name, f"be a finite number {'of at least 0' if allows_zero else 'above 0'}", value)
    for name, choices in _CHOICES.items():
        require(
            isinstance(fields[name], str) and fields[name] in choices,
            name,
            f"be one of {tuple(choices)}",
            fields[name],
        )
    for name in ("base_model_name_or_path", "target_fingerprint"):
        require(fields[name] is None or isinstance(fields[name], str), name, "be text or left out", fields[name])
    cap = fields["final_logit_softcapping"]
    require(cap is None or (is_finite(cap) and cap >= 0), "final_logit_softcapping", "be None or a finite number", cap)
    for name in ("rope_parameters", "backbone_config"):
        require(
            fields[name] is None or isinstance(fields[name], dict), name, "be a dictionary or left out", fields[name]
        )
    act = fields["hidden_act"]
    require(isinstance(act, str) and act in ACT2FN, "hidden_act", "be an activation that Transformers knows", act)
    for name in ("target_layer_ids", "sliding_layers"):
        _check_ids(name, fields[name])
    _check_rope(fields["rope_parameters"])
    _check_temperatures(fields["sts_temperatures"], fields["block_size"])
    _check_rates(fields["accept_rates"], fields["block_size"])
    _check_vocabulary(fields)


def _check_rope(parameters: dict[str, Any] | None) -> None:
    if not parameters:
        return
    kind = parameters.get("rope_type", "default")
    is_known = isinstance(kind, str) and kind in _ROPE_TYPES
    require(is_known, "rope_parameters", f"have a `rope_type` of {_ROPE_TYPES}", parameters)
    given = [name for name in ("rope_theta", *_ROPE_NUMBERS) if parameters.get(name) is not None]
    for name in (*_ROPE_NEEDS.get(kind, ()), *given):
        is_right = is_finite(parameters.get(name)) and parameters[name] > 0
        require(is_right, "rope_parameters", f"have a finite `{name}` above 0", parameters)
    share = parameters.get("partial_rotary_factor")
    require(share is None or share <= 1, "rope_parameters", "have a `partial_rotary_factor` of at most 1", parameters)


def _check_ids(name: str, ids: Any) -> None:
    if ids is None:
        return
    is_sequence = isinstance(ids, (list, tuple, range))
    require(
        is_sequence and all(is_integer(layer_id) for layer_id in ids),
        name,
        "be a list of integers",
        ids,
    )


def _check_temperatures(temperatures: Any, block_size: int) -> None:
    if temperatures is None:
        return
    is_right = (
        isinstance(temperatures, (list, tuple))
        and len(temperatures) == block_size
        and all(is_finite(value) and value > 0 for value in temperatures)
    )
    require(is_right, "sts_temperatures", f"be {block_size} positive numbers (block_size)", temperatures)


def _check_rates(rates: Any, block_size: int) -> None:
    is_right = rates is None or (
        isinstance(rates, (list, tuple))
        and len(rates) == block_size
        and all(is_finite(value) and 0 <= value <= 1 for value in rates)
    )
    require(is_right, "accept_rates", f"be {block_size} numbers in [0, 1] (block_size)", rates)


def _check_vocabulary(fields: Mapping[str, Any]) -> None:
    size, mask, drafts = fields["vocab_size"], fields["mask_token_id"], fields["draft_vocab_size"]
    require(is_integer(mask) and 0 <= mask < size, "mask_token_id", f"lie in [0, {size - 1}]", mask)
    is_right = drafts is None or (is_integer(drafts) and 1 <= drafts <= size)
    require(is_right, "draft_vocab_size", f"lie in [1, {size}]", drafts)


def is_integer(value: Any) -> bool:
    """Return whether a field's value is a whole number."""
    # true and false are integers to Python
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Return whether a field's value is a number that is not absurdly large."""
    # of an integer too large for a float there is no finite one
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 1e30 and math.isfinite(value)


def require(holds: bool, name: str, rule: str, value: Any, whose: str = "drafter") -> None:
    """Raise a `ValueError` that names a field, its rule and its value unless `holds`."""
    if not holds:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        raise ValueError(f"`{name}` must {rule}, got {shown}. Correct it in the {whose}'s configuration.")
