"""The DSpark module of a DeepSeek-V4 checkpoint: its configuration and tensor names, translated to our drafter's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_hf.modeling.deepseek_v4.configuration import RELEASED_MODEL_TYPE, DeepseekV4DSparkConfig

PREFIX = "mtp."
_KEYS = ("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank")
# tensors of the first stage that stand before all stages, and of the last one that stand behind them
_FIRST = {"main_proj.weight": "fc.weight", "main_proj.scale": "fc.scale", "main_norm.weight": "hidden_norm.weight"}
_LAST = ("norm.", "markov_head.", "confidence_head.")
_STREAMS = "hc_head_"
# tensors of the checkpoints that also read images, which text alone has no use for
_IMAGES = ("vision.", "aligner.", "image_")
_IMAGES_BIAS = ".gate.bias_vl"
_IMAGES_KEYS = "vision_"


def is_released(fields: dict[str, Any]) -> bool:
    """Return whether `fields` of a `config.json` are those of a DeepSeek-V4 checkpoint, released or saved by us."""
    return fields.get("model_type") in (RELEASED_MODEL_TYPE, DeepseekV4DSparkConfig.model_type)


def reads_images(fields: Mapping[str, Any]) -> bool:
    """Return whether `fields` of a `config.json` are those of a checkpoint that also reads images."""
    return any(name.startswith(_IMAGES_KEYS) for name in fields)


def is_for_images(name: str) -> bool:
    """Return whether a stored tensor serves images alone: the vision tower, its aligner, the routers' second bias."""
    return name.startswith(_IMAGES) or name.endswith(_IMAGES_BIAS)


def drafter_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `DSparkConfig`'s fields for the DSpark module of a checkpoint.

    Raises:
        ValueError: if the checkpoint has no such module, or leaves out one of its keys.
    """
    missing = [name for name in _KEYS if fields.get(name) is None]
    if missing:
        raise ValueError(
            f"`pretrained_model_name_or_path` must hold a checkpoint with a DSpark module, got one without {missing} "
            "in its configuration. Take a release with DSpark inside, or train a drafter with `from_target`."
        )
    described = {name: value for name, value in fields.items() if name != "model_type"}
    config = DeepseekV4DSparkConfig(**described)
    layer_ids = list(fields["dspark_target_layer_ids"])
    # the stages' ratios follow the layers'; some configurations leave them out
    num_stages = len(config.compress_ratios) - config.num_hidden_layers or len(layer_ids)
    return {
        "model_type": "dspark",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe_intermediate_size,
        "num_hidden_layers": num_stages,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": 1,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "block_size": fields["dspark_block_size"],
        "mask_token_id": fields["dspark_noise_token_id"],
        "target_layer_ids": layer_ids,
        "num_target_layers": config.num_hidden_layers,
        "markov_rank": fields["dspark_markov_rank"],
        "initializer_range": config.initializer_range,
        "dtype": fields.get("dtype") or fields.get("torch_dtype"),
        **{name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **backbone_fields(config, described),
    }


def backbone_fields(config: DeepseekV4DSparkConfig, described: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `DSparkConfig` for stages like the layers of `config`, whose fields are `described`."""
    return {
        "backbone_type": "deepseek_v4",
        "backbone_config": described,
        "context_window": config.sliding_window,
        "confidence_head_bias": False,
    }


def our_name(released: str, num_stages: int) -> str:
    """Return the drafter's name of a tensor `mtp.*`."""
    _, stage, name = released.split(".", 2)
    if stage == "0" and name in _FIRST:
        return _FIRST[name]
    if stage == str(num_stages - 1):
        if name.startswith(_LAST):
            return name
        if name.startswith(_STREAMS):
            return f"streams.{name}"
    return f"layers.{stage}.{name}"


def released_name(ours: str, num_stages: int) -> str:
    """Return the released name of one of the drafter's tensors."""
    first = {name: released for released, name in _FIRST.items()}
    if ours in first:
        return f"{PREFIX}0.{first[ours]}"
    if ours.startswith("layers."):
        return f"{PREFIX}{ours.removeprefix('layers.')}"
    return f"{PREFIX}{num_stages - 1}.{ours.removeprefix('streams.')}"
