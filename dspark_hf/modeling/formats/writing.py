"""Write a drafter in the layout of another project, for the servers that read it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.formats.standalone import write_standalone
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel

LAYOUTS = ("deepspec", "speculators", "specforge", "custom_generate")
_SCALED_ROPES = ("default", "linear", "yarn", "llama3")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export(
    drafter: DSparkAssistantModel, layout: str, folder: str | os.PathLike, target: TargetAdapter | None = None
) -> None:
    """Write `config.json` and `model.safetensors` of a drafter in another layout into `folder`.

    `"custom_generate"` is our own layout with the code beside it, so that Transformers alone can use the folder.

    Args:
        drafter: the drafter; its weights are copied bit for bit.
        layout: one of `LAYOUTS`.
        folder: where to write; it is made if it is not there.
        target: the drafter's target, for drafters that borrow their vocabulary: DeepSpec's layout holds a copy of it,
            and the other two lend the bare matrices, which must then mean the same.

    Raises:
        ValueError: if the layout cannot say what the drafter does, or the target is needed.
    """
    config = drafter.config
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {LAYOUTS}, got {layout!r}. Choose one of them.")
    if layout == "custom_generate":
        write_standalone(drafter, folder)
        return
    _check_expressible(config, layout)
    tensors = _with_vocabulary(drafter, layout, target)
    write_fields = {"deepspec": deepspec_fields, "speculators": speculators_fields, "specforge": specforge_fields}
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    fields = {name: value for name, value in write_fields[layout](config).items() if value is not None}
    fields["dtype"] = str(drafter.dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps(fields, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _check_expressible(config: DSparkConfig, layout: str) -> None:
    is_gemma = config.backbone_type == "gemma4"
    rope = config.rope_parameters
    plain_rope = rope.get("rope_type", "default") in _SCALED_ROPES and rope.get("partial_rotary_factor", 1.0) == 1.0
    for holds, name, rule in (
        (
            config.backbone_type == "qwen3" or (is_gemma and layout == "deepspec"),
            "backbone_type",
            "be 'qwen3', or for DeepSpec 'gemma4'",
        ),
        (config.use_qk_norm, "use_qk_norm", "be true: layers elsewhere norm queries and keys"),
        (is_gemma or not config.attention_k_eq_v, "attention_k_eq_v", "be false"),
        (is_gemma or plain_rope, "rope_parameters", "turn whole heads"),
        (not config.rope_interleaved, "rope_interleaved", "be false"),
        (is_gemma or config.embed_scale == 1.0, "embed_scale", "be 1"),
        (is_gemma or not config.final_logit_softcapping, "final_logit_softcapping", "be None"),
        (config.context_window is None or layout == "speculators", "context_window", "be None"),
        (config.sample_from_anchor or layout == "speculators", "sample_from_anchor", "be true"),
        (config.confidence_head_bias, "confidence_head_bias", "be true"),
    ):
        if not holds:
            raise ValueError(
                f"`{name}` must {rule} in {layout}'s layout, got {getattr(config, name)!r}. Servers would draft "
                "otherwise than the drafter does: serve it with dspark_hf, or train one without."
            )


def _with_vocabulary(drafter: DSparkAssistantModel, layout: str, target: TargetAdapter | None) -> dict[str, Tensor]:
    config = drafter.config
    tensors = {name: x.detach().cpu().contiguous() for name, x in drafter.state_dict().items()}
    head = drafter.markov_head
    if config.markov_over_draft_vocab and head is not None:
        # elsewhere a previous token is looked up by its own id
        with torch.no_grad():
            rows = head.embed(torch.arange(config.vocab_size, device=drafter.device))
        tensors["markov_head.markov_w1.weight"] = rows.cpu().contiguous()
        del tensors["markov_head.known_ids"]
    needs_head = not config.owns_head and (config.draft_vocab_size is not None or layout == "deepspec")
    needs_embedding = not config.owns_embeddings and layout == "deepspec"
    has_own_head = config.owns_head or config.draft_vocab_size is None
    if config.owns_embeddings and config.owns_head:
        return tensors
    if target is None and config.borrows_bare_weights and has_own_head:
        # borrowed by the servers as it is here
        return tensors
    if target is None:
        raise ValueError(
            "`target` must be given for a drafter that borrows its target's vocabulary, got None. Pass the drafter's "
            "target (`--target`)."
        )
    drafter.check_target(target)
    if not config.borrows_bare_weights and layout != "deepspec":
        _check_bare(target)
    if needs_embedding:
        ids = torch.arange(config.vocab_size)
        rows = target.embed_bare(ids) if config.borrows_bare_weights else target.embed(ids)
        tensors["embed_tokens.weight"] = rows.to(device="cpu", dtype=drafter.dtype).contiguous()
    if needs_head:
        tensors["lm_head.weight"] = _head_rows(drafter, target)
    return tensors


def _check_bare(target: TargetAdapter) -> None:
    ids = torch.arange(min(8, target.vocab_size))
    if not torch.equal(target.embed(ids), target.embed_bare(ids)) or target.logit_cap or target.logit_factor != 1.0:
        raise ValueError(
            "`target` must neither scale its embedding nor scale or cap its logits, since other layouts lend the bare "
            f"matrices, got {type(target.model).__name__}. Serve this drafter with dspark_hf."
        )


def _head_rows(drafter: DSparkAssistantModel, target: TargetAdapter) -> Tensor:
    ids = drafter.draft_token_ids
    ids = torch.arange(drafter.config.vocab_size) if ids is None else ids
    found = target.head_rows(ids)
    is_plain = drafter.config.borrows_bare_weights or (not target.logit_cap and target.logit_factor == 1.0)
    if found is None or found[1] is not None or not is_plain:
        raise ValueError(
            "`target` must have a plain output head: in floating point, without a bias, a scale or a cap, got "
            f"{type(target.model).__name__}. Serve this drafter with dspark_hf."
        )
    return found[0].to(device="cpu", dtype=drafter.dtype).contiguous()


def _layer_fields(config: DSparkConfig) -> dict[str, Any]:
    window, sliding = config.context_window, "sliding_attention"
    kinds = [sliding if config.window_of(i) else "full_attention" for i in range(config.num_hidden_layers)]
    return {
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "layer_types": kinds,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "qwen3",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters),
        **({"sliding_window": window, "use_sliding_window": True} if sliding in kinds else {}),
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
        **{name: getattr(config, name, None) for name in _TOKENS},
    }


def _head_fields(config: DSparkConfig) -> dict[str, Any]:
    return {
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
    }


def _own_fields(config: DSparkConfig) -> dict[str, Any]:
    # read again by us; others pass over what they do not know
    names = ("sts_temperatures", "accept_rates", "base_model_name_or_path", "target_fingerprint", "num_target_layers")
    return {name: getattr(config, name) for name in names}


def deepspec_fields(config: DSparkConfig) -> dict[str, Any]:
    """Return the `config.json` of a drafter in DeepSpec's layout, which vLLM and SGLang read."""
    fields = {
        **_layer_fields(config),
        **_head_fields(config),
        **_own_fields(config),
        "architectures": ["Qwen3DSparkModel"],
        "block_size": config.block_size,
        "draft_vocab_size": config.draft_vocab_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": config.target_layer_ids,
    }
    if config.backbone_type != "gemma4":
        return fields
    return {
        **{name: value for name, value in fields.items() if name != "hidden_act"},
        "architectures": ["Gemma4DSparkModel"],
        "attention_k_eq_v": config.attention_k_eq_v,
        "final_logit_softcapping": config.final_logit_softcapping,
        "global_head_dim": config.head_dim,
        "hidden_activation": config.hidden_act,
        "model_type": "gemma4_text",
        "num_global_key_value_heads": config.num_key_value_heads,
        "rope_parameters": {"full_attention": dict(config.rope_parameters)},
    }


def speculators_fields(config: DSparkConfig) -> dict[str, Any]:
    """Return the `config.json` of a drafter in speculators' layout."""
    return {
        **_head_fields(config),
        **_own_fields(config),
        "architectures": ["DSparkDraftModel"],
        # the embedding is 0 there, -1 here
        "aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in config.target_layer_ids],
        "block_size": config.num_slots,
        "draft_vocab_size": config.num_draft_logits,
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": not config.has_causal_sliding_layers,
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.block_size}],
            "verifier": {"architectures": [], "name_or_path": config.base_model_name_or_path},
        },
        "speculators_model_type": "dspark",
        "speculators_version": "0.9.0",
        "tie_word_embeddings": False,
        "transformer_layer_config": _without_none(_layer_fields(config)),
    }


def specforge_fields(config: DSparkConfig) -> dict[str, Any]:
    """Return the `config.json` of a drafter in SpecForge's layout."""
    nested = {"mask_token_id": config.mask_token_id, "target_layer_ids": config.target_layer_ids}
    return {
        **_layer_fields(config),
        **_own_fields(config),
        "architectures": ["DSparkDraftModel"],
        "block_size": config.block_size,
        "draft_vocab_size": config.draft_vocab_size,
        "dflash_config": {"projector_type": "dspark", **_head_fields(config), **nested},
    }


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
