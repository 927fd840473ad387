"""What can be told of a pair without drafting: names, sizes, vocabularies, fingerprints, what weights look like."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dspark_hf.doctor.results import Check
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.backbone import RMSNorm
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.from_target import check_match
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel
from dspark_hf.modeling.provenance import fingerprint
from dspark_hf.registry.entries import known_drafters

# the share of the tokens of one vocabulary that may have another id in the other: tools add a few
_MOST_MOVED = 0.01
_QUANTISED_NAME = re.compile(r"(?i)(awq|gptq|gguf|bnb|int[48]|fp[48]|nf4|[48]-?bit|w[48]a\d+|q[2-8]_\w)")
# numbers that share a scale in most formats, and what four bits can tell apart
_GROUP, _FOUR_BITS = 32, 16
_EIGHT_BITS = 256
# rows of a matrix that are looked at
_MOST_ROWS = 64


def check_belonging(
    target: TargetAdapter, drafter: DSparkAssistantModel, tokenizer: Any, drafter_tokenizer: Any
) -> list[Check]:
    """Return what names, sizes, tokenizers, fingerprint and weights say of a pair."""
    config = drafter.config
    return [
        _check_name(config, target),
        _check_sizes(config, target),
        _check_tokenizers(tokenizer, drafter_tokenizer),
        _check_fingerprint(config, target),
        _check_target_weights(target),
        _check_drafter_weights(drafter),
    ]


def _check_name(config: DSparkConfig, target: TargetAdapter) -> Check:
    made_for, given = config.base_model_name_or_path, getattr(target.model.config, "name_or_path", None)
    if not made_for or not given:
        return Check("name", None, f"made for {made_for or 'a target without a name'}, given {given or 'one without'}")
    # folders and the hub agree in the last part at best
    is_same = Path(made_for).name.lower() == Path(given).name.lower() or _is_known_as(target, made_for)
    return Check("name", is_same, f"made for {made_for}, given {given}")


def _is_known_as(target: TargetAdapter, name: str) -> bool:
    """Return whether a model of another name is known to be the one of that name, by its fingerprint."""
    found = fingerprint(target)
    return found is not None and any(one.target == name and one.fingerprint == found for one in known_drafters())


def _check_sizes(config: DSparkConfig, target: TargetAdapter) -> Check:
    try:
        check_match(config, target)
    except ValueError as error:
        return Check("sizes", False, str(error))
    layers = f"{target.num_layers} layers"
    if config.num_target_layers != target.num_layers:
        # the field may only be what the tapped layers need
        is_known = config.num_target_layers > config.target_layer_ids[-1] + 1
        found = f"made for {config.num_target_layers} layers or more, given {target.num_layers}"
        return Check("sizes", False if is_known else None, found)
    return Check("sizes", True, f"{target.vocab_size:,} tokens, width {target.hidden_size}, {layers}")


def _check_tokenizers(tokenizer: Any, drafter_tokenizer: Any) -> Check:
    if tokenizer is None or drafter_tokenizer is None:
        whose = "the target's" if tokenizer is None else "the drafter's"
        return Check("tokenizer", None, f"{whose} is not at hand")
    ours, theirs = drafter_tokenizer.get_vocab(), tokenizer.get_vocab()
    moved = [token for token, token_id in ours.items() if theirs.get(token) != token_id]
    is_same = len(moved) <= _MOST_MOVED * len(ours)
    found = f"{len(moved):,} of the drafter's {len(ours):,} tokens have another id, or none"
    return Check("tokenizer", is_same, found if moved else f"the same {len(ours):,} tokens")


def _check_fingerprint(config: DSparkConfig, target: TargetAdapter) -> Check:
    found = fingerprint(target)
    if config.target_fingerprint is None or found is None:
        whose = "the drafter names none" if config.target_fingerprint is None else "out of reach"
        return Check("fingerprint", None, whose)
    is_same = found == config.target_fingerprint
    return Check("fingerprint", is_same, found if is_same else f"{found}, made for {config.target_fingerprint}")


def _check_target_weights(target: TargetAdapter) -> Check:
    """Return whether a target is as it was trained; a drafter's states were read of one of the two kinds."""
    method = getattr(getattr(target.model.config, "quantization_config", None), "quant_method", None)
    if method is not None or getattr(target.model, "is_quantized", False):
        return Check("target's weights", False, f"quantised ({getattr(method, 'value', method)})")
    name = str(getattr(target.model.config, "name_or_path", ""))
    if (marked := _QUANTISED_NAME.search(Path(name).name)) is not None:
        return Check("target's weights", False, f"quantised, by its name ({marked[0]})")
    bits = next((bits for weight in _matrices(target) if (bits := _bits_of(weight)) is not None), None)
    if bits is not None:
        return Check("target's weights", False, f"as of {bits} bits or fewer: quantised once, and unpacked")
    return Check("target's weights", True, f"not quantised, {str(target.model.dtype).removeprefix('torch.')}")


def _matrices(target: TargetAdapter) -> Iterator[Tensor]:
    layer = target.layers[target.num_layers // 2]
    for module in layer.modules():
        if isinstance(module, nn.Linear) and module.weight.is_floating_point() and not module.weight.is_meta:
            yield module.weight


def _bits_of(weight: Tensor) -> int | None:
    """Return the bits that a matrix's numbers were stored in once, if that is to be seen: 4 or 8."""
    rows = weight.detach()[:_MOST_ROWS].float().cpu()
    if rows.shape[1] >= _GROUP:
        groups = rows[:, : rows.shape[1] // _GROUP * _GROUP].reshape(-1, _GROUP)
        if _num_levels(groups) <= _FOUR_BITS:
            return 4
    if rows.shape[1] >= 4 * _EIGHT_BITS and _num_levels(rows) <= _EIGHT_BITS:
        return 8
    return None


def _num_levels(groups: Tensor) -> float:
    """Return how many different numbers there are in each of `groups` `(n, size)`, the median."""
    ordered = groups.sort(dim=1).values
    return float(((ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1).float().median())


def _check_drafter_weights(drafter: DSparkAssistantModel) -> Check:
    # training moves every norm's scale, which starts as ones; those of a warm start are the target's
    norms = [
        module.weight for module in drafter.modules() if isinstance(module, RMSNorm) and module.weight is not None
    ]
    if norms and all(bool((weight == 1).all()) for weight in norms):
        return Check("drafter's weights", False, "every norm's scale is 1, as before any training")
    head = drafter.markov_head
    weight = None if head is None else getattr(head.markov_w2, "weight", None)
    if weight is not None and weight.is_floating_point() and not weight.any():
        return Check("drafter's weights", False, "the Markov head is zero, as before any training")
    is_finite = all(bool(x.isfinite().all()) for x in drafter.parameters() if x.is_floating_point())
    return Check("drafter's weights", is_finite, "trained" if is_finite else "not finite")
