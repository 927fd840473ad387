"""Derive a drafter's configuration and first weights from its target, and check that the two belong together."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.rollback import check_rollback
from dspark_hf.generation.wrappers import unwrap
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.formats.deepseek_v4 import backbone_fields
from dspark_hf.modeling.provenance import target_fields


def check_servable(target: PreTrainedModel) -> PreTrainedModel:
    """Return `target`, without what is wrapped around it, or raise a `ValueError` if no drafter can assist it."""
    target = unwrap(target)
    if not isinstance(target, PreTrainedModel):
        raise TypeError(
            f"`target` must be a causal LM of Transformers, got {type(target).__name__}. Pass the model inside."
        )
    if getattr(target.config, "is_encoder_decoder", False):
        raise ValueError(
            f"`target` must be a decoder-only causal LM, got the encoder-decoder {type(target).__name__}. "
            "DSpark has no drafter for encoder-decoders."
        )
    # before a drafter is trained in vain
    check_rollback(target)
    return target


# of a drafter's attention where the target has none
_HEAD_DIM = 64


def config_for_target(
    target: TargetAdapter,
    *,
    num_hidden_layers: int | None,
    target_layer_ids: Sequence[int] | None,
    mask_token_id: int | None,
    warm_start: bool,
    **fields: Any,
) -> DSparkConfig:
    """Return the configuration of a drafter for `target`; `None` takes the default that fits the target."""
    config, num_layers = target.config, target.num_layers
    layer_config = _last_layer_config(config)
    head_dim, num_heads = getattr(layer_config, "head_dim", None), getattr(layer_config, "num_attention_heads", None)
    if num_heads is None:
        # Mamba's layers have none
        head_dim = min(_HEAD_DIM, target.hidden_size)
        num_heads = target.hidden_size // head_dim
    if isinstance(config, DeepseekV4DSparkConfig) and fields.get("backbone_type", "deepseek_v4") == "deepseek_v4":
        fields = {**_deepseek_fields(config), **fields}
        # a stage for every tapped layer, the last ones, as released
        num_hidden_layers = min(3, num_layers) if num_hidden_layers is None else num_hidden_layers
        target_layer_ids = (
            range(num_layers - num_hidden_layers, num_layers) if target_layer_ids is None else target_layer_ids
        )
    derived = {
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": _intermediate_size(layer_config),
        "num_hidden_layers": min(5, num_layers) if num_hidden_layers is None else num_hidden_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": getattr(layer_config, "num_key_value_heads", None) or num_heads,
        "head_dim": head_dim,
        "hidden_act": getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None) or "silu",
        "rms_norm_eps": getattr(config, "rms_norm_eps", None) or 1e-6,
        "rope_parameters": _rope_parameters(config),
        "max_position_embeddings": getattr(config, "max_position_embeddings", 32768),
        "target_layer_ids": _default_layer_ids(config, num_layers)
        if target_layer_ids is None
        else list(target_layer_ids),
        "num_target_layers": num_layers,
        "mask_token_id": _default_mask_token_id(config) if mask_token_id is None else mask_token_id,
        # copied attention weights know no query and key norm unless the target's do
        "use_qk_norm": not warm_start or hasattr(_attention(target.layers[-1]), "q_norm"),
        "backbone_type": "gemma3" if warm_start and _is_gemma3_kind(target.layers[-1]) else "qwen3",
        **target_fields(target),
        # the Pipeline keeps the target's tokenizer only if these agree
        **{name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    drafter_config = DSparkConfig(**{**derived, **fields})
    if not drafter_config.owns_embeddings:
        _check_lent(target)
    return drafter_config


def _check_lent(target: TargetAdapter) -> None:
    """Raise a `ValueError` unless embedding and output head are as wide as the hidden states."""
    embedding, head = target.model.get_input_embeddings(), target.model.get_output_embeddings()
    for name, width in (
        ("embeddings", getattr(embedding, "embedding_dim", None)),
        ("output head", getattr(head, "in_features", None)),
    ):
        if width is not None and width != target.hidden_size:
            raise ValueError(
                f"`target` must have {name} of its hidden size {target.hidden_size} to lend them to a drafter, got "
                f"{width}. Pass `owns_embeddings=True`: the drafter then has its own."
            )


def _intermediate_size(layer_config: Any) -> int | None:
    size = getattr(layer_config, "intermediate_size", None)
    # Gemma 3n has one for every layer
    return size[-1] if isinstance(size, list | tuple) else size


def _deepseek_fields(config: DeepseekV4DSparkConfig) -> dict[str, Any]:
    """Return what a drafter's configuration takes from DeepSeek-V4's own."""
    fields = config.to_dict()
    described = {name: fields[name] for name in inspect.signature(type(config).__init__).parameters if name in fields}
    return backbone_fields(config, described)


def _last_layer_config(config: Any) -> Any:
    # Gemma 4's heads differ from layer to layer, and its configuration refuses to answer for all of them
    return (
        config.per_layer_config[config.num_hidden_layers - 1] if getattr(config, "is_heterogeneous", False) else config
    )


def _default_layer_ids(config: Any, num_layers: int) -> list[int]:
    # Llama 3.2 Vision leaves these out where there is no image
    skipped = set(getattr(config, "cross_attention_layers", None) or ())
    run = [layer_id for layer_id in range(num_layers) if layer_id not in skipped]
    return sorted({max((i for i in run if i <= wanted), default=run[0]) for wanted in _spaced_layer_ids(num_layers)})


def _spaced_layer_ids(num_layers: int, count: int = 5) -> list[int]:
    first, last = min(1, num_layers - 1), max(num_layers - 3, 0)
    return sorted({round(i) for i in torch.linspace(min(first, last), last, count, device="cpu").tolist()})


def _default_mask_token_id(config: Any) -> int:
    bos, eos, pad = (getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad"))
    taken = [bos, *eos] if isinstance(eos, list) else [bos, eos]
    if pad is not None and pad not in taken and 0 <= pad < config.vocab_size:
        return pad
    return config.vocab_size - 1


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Return the target's rotation over whole heads: its base, and its scaling if that is the same at any length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # layers of one kind may go without (NoPE)
    parameters = parameters.get("full_attention", parameters) or {}
    theta = float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    # the other kinds turn a long text's keys otherwise than a short one's, or are made for the target's heads
    if parameters.get("rope_type") not in ("linear", "yarn", "llama3"):
        return {"rope_type": "default", "rope_theta": theta}
    kept = {name: value for name, value in parameters.items() if name != "partial_rotary_factor"}
    kept.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    return {**kept, "rope_theta": theta}


def check_match(config: DSparkConfig, target: TargetAdapter) -> None:
    """Raise a `ValueError` that names the first mismatch between a drafter and a target."""
    for name, ours, theirs in (
        ("hidden_size", config.hidden_size, target.hidden_size),
        ("vocab_size", config.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            remedy = "This drafter was trained for another target: load the one made for this model"
            if name == "vocab_size":
                remedy += f", or call `drafter.resize_token_embeddings({theirs})` if this target was resized"
            raise ValueError(f"`assistant_model` must have the target's `{name}` {theirs}, got {ours}. {remedy}.")
    last = target.num_layers - 1
    if config.target_layer_ids[-1] > last:
        raise ValueError(
            f"`target_layer_ids` must lie in [-1, {last}] for this target, got {config.target_layer_ids}. "
            "The drafter was made for another target: pass that one, or train a drafter for this."
        )


def _is_gemma3_kind(layer: torch.nn.Module) -> bool:
    """Return whether a layer has sandwich norms and scales its scores by the usual root of the head's size."""
    scaling, size = (getattr(_attention(layer), name, None) for name in ("scaling", "head_dim"))
    usual = scaling is not None and size is not None and abs(scaling - size**-0.5) < 1e-6
    return usual and hasattr(layer, "pre_feedforward_layernorm")


def _attention(layer: torch.nn.Module) -> torch.nn.Module | None:
    return getattr(layer, "self_attn", None)
