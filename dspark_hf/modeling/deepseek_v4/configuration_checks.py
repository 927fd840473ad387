"""Check the kinds, finiteness and bounds of a DeepSeek-V4 configuration's fields, before anything is built of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from dspark_hf.modeling import configuration_checks
from dspark_hf.modeling.configuration_checks import is_finite, is_integer

require = partial(configuration_checks.require, whose="model")

# far above every release, and low enough that a wrong number does not ask for terabytes or spin for hours
_MOST_LAYERS = 1024
_WIDEST = 1 << 20
_LARGEST_VOCABULARY = 1 << 24
_LONGEST_CONTEXT = 1 << 31

# the bounds of integers
_INTEGERS: Mapping[str, tuple[int, int]] = {
    "vocab_size": (1, _LARGEST_VOCABULARY),
    "hidden_size": (1, _WIDEST),
    "moe_intermediate_size": (1, _WIDEST),
    "num_hidden_layers": (1, _MOST_LAYERS),
    "num_attention_heads": (1, _WIDEST),
    "head_dim": (1, _WIDEST),
    "qk_rope_head_dim": (2, _WIDEST),
    "q_lora_rank": (1, _WIDEST),
    "o_groups": (1, _WIDEST),
    "o_lora_rank": (1, _WIDEST),
    "n_routed_experts": (1, _WIDEST),
    "num_experts_per_tok": (1, _WIDEST),
    "num_hash_layers": (0, _MOST_LAYERS),
    "sliding_window": (1, _WIDEST),
    "index_n_heads": (1, _WIDEST),
    "index_head_dim": (1, _WIDEST),
    "index_topk": (1, _LONGEST_CONTEXT),
    "hc_mult": (1, 64),
    "hc_sinkhorn_iters": (1, 1000),
    "max_position_embeddings": (1, _LONGEST_CONTEXT),
    "max_rollback": (0, _WIDEST),
}
# the same of those that may be None
_OPTIONAL_INTEGERS: Mapping[str, tuple[int, int]] = {
    "num_nextn_predict_layers": (0, _MOST_LAYERS),
    "dspark_block_size": (1, 1024),
    "dspark_noise_token_id": (0, _LARGEST_VOCABULARY),
    "dspark_markov_rank": (0, _WIDEST),
}
# what numbers must be more than, or at least
_POSITIVE = ("swiglu_limit", "rope_theta", "compress_rope_theta")
_NOT_NEGATIVE = (
    "routed_scaling_factor",
    "hc_eps",
    "rms_norm_eps",
    "initializer_range",
    "router_aux_loss_coef",
    "indexer_loss_coef",
)
_FLAGS = ("norm_topk_prob", "output_router_logits", "use_cache")
_YARN = ("factor", "original_max_position_embeddings")
_YARN_OPTIONAL = ("beta_fast", "beta_slow")


def check_kinds(fields: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names the first of `fields` that is not of its kind, not finite or out of bounds."""
    for name, bounds in _INTEGERS.items():
        _check_integer(name, fields[name], bounds)
    for name, bounds in _OPTIONAL_INTEGERS.items():
        if fields[name] is not None:
            _check_integer(name, fields[name], bounds)
    for name in _POSITIVE:
        require(is_finite(fields[name]) and fields[name] > 0, name, "be a finite number above 0", fields[name])
    for name in _NOT_NEGATIVE:
        require(is_finite(fields[name]) and fields[name] >= 0, name, "be a finite number, at least 0", fields[name])
    for name in _FLAGS:
        require(isinstance(fields[name], bool), name, "be true or false", fields[name])
    _check_integers("compress_ratios", fields["compress_ratios"], 0, _WIDEST, 2 * _MOST_LAYERS)
    _check_integers("dspark_target_layer_ids", fields["dspark_target_layer_ids"], 0, _MOST_LAYERS, _MOST_LAYERS)


def check_rope_scaling(scaling: Any) -> None:
    """Raise a `ValueError` unless `scaling` is None or YaRN's parameters, the only kind that V4 has."""
    if scaling is None:
        return
    require(isinstance(scaling, dict), "rope_scaling", "be YaRN's parameters, or None", scaling)
    kind = scaling.get("type", scaling.get("rope_type"))
    require(kind == "yarn", "rope_scaling", "be of the type 'yarn', or None", scaling)
    for name in (*_YARN, *(name for name in _YARN_OPTIONAL if name in scaling)):
        value = scaling.get(name)
        require(is_finite(value) and value > 0, "rope_scaling", f"have a number above 0 as its {name!r}", scaling)


def _check_integer(name: str, value: Any, bounds: tuple[int, int]) -> None:
    lowest, highest = bounds
    is_right = is_integer(value) and lowest <= value <= highest
    require(is_right, name, f"be an integer in [{lowest}, {highest}]", value)


def _check_integers(name: str, values: Any, lowest: int, highest: int, most: int) -> None:
    if values is not None:
        is_right = isinstance(values, (list, tuple, range)) and len(values) <= most
        is_right = is_right and all(is_integer(value) and lowest <= value <= highest for value in values)
        require(is_right, name, f"be a list of at most {most} integers in [{lowest}, {highest}]", values)
