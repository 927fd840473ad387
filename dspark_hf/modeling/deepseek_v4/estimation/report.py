"""Everything that is estimated of a model, beside DeepSeek-V3.2 and beside what is published."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from dspark_hf.modeling.deepseek_v4.estimation.devices import DeviceCount, count_devices
from dspark_hf.modeling.deepseek_v4.estimation.flops import Flops, count_flops
from dspark_hf.modeling.deepseek_v4.estimation.formats import CacheFormat, WeightFormat
from dspark_hf.modeling.deepseek_v4.estimation.known import BASELINE, Claim, claim_of
from dspark_hf.modeling.deepseek_v4.estimation.kv_cache import KVCache, count_drafter_cache, count_kv_cache
from dspark_hf.modeling.deepseek_v4.estimation.reading import read_model
from dspark_hf.modeling.deepseek_v4.estimation.shapes import DeepseekV4Shape, Model
from dspark_hf.modeling.deepseek_v4.estimation.tensors import drafter_tensors, target_tensors
from dspark_hf.modeling.deepseek_v4.estimation.weights import Weights, count_weights

MILLION = range(1_000_000, 2**20 + 1)

ASSUMPTIONS = (
    "Weights: every tensor by its shape, scales and tables included; the MTP-1 module of the first releases is left "
    "out. The format is that of the matrices the release quantises; embedding, head, router, compressors and norms "
    "stay as released.",
    "Active parameters: all that a token passes, the output head included, the input embedding not.",
    "KV cache: entries as released (V4: FP8 with the rotated part in bf16, indexer keys in FP4; V3.2: FP8, both), "
    "tokens not yet compressed in fp32. Paging and allocation are left out.",
    "FLOPs: one decoded token of the target, two per multiplication of matrix products; norms, softmax, top-k, "
    "rotations, pooling and the mixing of streams are left out. FP8 equivalents count FP4 products half and bf16 "
    "or wider ones double, in the arithmetic of the released code; FP4 weights times FP8 activations run as FP8.",
    "Devices: target, drafter and KV cache split evenly, each device filled to 90% of its memory.",
)


@dataclass(frozen=True)
class EstimationSettings:
    """What to estimate for.

    Args:
        context: tokens in each sequence.
        batch_size: sequences.
        weight_format: how the large matrices are stored.
        cache_format: how entries of the KV cache are stored.

    Raises:
        ValueError: if a number is too small; the message names it.
    """

    context: int = 2**20
    batch_size: int = 1
    weight_format: WeightFormat = WeightFormat.released
    cache_format: CacheFormat = CacheFormat.released

    def __post_init__(self) -> None:
        for name, value in (("--context", self.context), ("--batch-size", self.batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}. Raise it.")


@dataclass(frozen=True)
class DrafterEstimate:
    """What a DSpark module adds to its target. `release` brings it, where that is another than the target's."""

    num_stages: int
    block_size: int
    weights: Weights
    cache: KVCache
    release: str | None


@dataclass(frozen=True)
class Estimate:
    """What one model takes."""

    name: str
    max_context: int
    weights: Weights
    cache: KVCache
    flops: Flops
    drafter: DrafterEstimate | None

    @property
    def num_bytes(self) -> int:
        """Bytes of target, drafter and both caches."""
        own = self.weights.num_bytes + self.cache.num_bytes
        if self.drafter is None:
            return own
        return own + self.drafter.weights.num_bytes + self.drafter.cache.num_bytes


@dataclass(frozen=True)
class Report:
    """A model's estimate, that of DeepSeek-V3.2 (None for itself), what is published, and what devices it needs."""

    settings: EstimationSettings
    model: Estimate
    baseline: Estimate | None
    claim: Claim | None
    devices: list[DeviceCount]

    @property
    def is_at_claimed_context(self) -> bool:
        """Whether the published ratios, which are for 1M tokens, can be set beside these."""
        return self.settings.context in MILLION and self.settings.cache_format is CacheFormat.released


def make_report(name: str, settings: EstimationSettings) -> Report:
    """Return the estimate of a known name, a folder with a `config.json`, or another hub name.

    Raises:
        ValueError: if there is no readable configuration of DeepSeek-V4 or DeepSeek-V3.2.

    Example:

        >>> report = make_report("deepseek-ai/DeepSeek-V4-Pro", EstimationSettings(context=2**20))
        >>> round(report.model.cache.num_bytes / report.baseline.cache.num_bytes, 2)
        0.1
    """
    model = read_model(name)
    baseline = read_model(BASELINE)
    estimate = make_estimate(model, settings)
    return Report(
        settings=settings,
        model=estimate,
        baseline=None if model.shape == baseline.shape else make_estimate(baseline, settings),
        claim=claim_of(name),
        devices=count_devices(estimate.num_bytes),
    )


def make_estimate(model: Model, settings: EstimationSettings) -> Estimate:
    """Return what a model takes."""
    return Estimate(
        name=model.name,
        max_context=model.shape.max_position_embeddings,
        weights=count_weights(target_tensors(model.shape), model.quantization, settings.weight_format),
        cache=count_kv_cache(model.shape, settings.context, settings.batch_size, settings.cache_format),
        flops=count_flops(model.shape, settings.context),
        drafter=_drafter_estimate(model, settings),
    )


def to_json(report: Report) -> str:
    """Return a report as JSON: bytes, parameters and FLOPs as plain numbers, totals beside the parts."""
    fields = {
        "settings": asdict(report.settings),
        "model": _estimate_fields(report.model),
        "baseline": None if report.baseline is None else _estimate_fields(report.baseline),
        "ratios": ratios(report),
        "published": None if report.claim is None else asdict(report.claim),
        "devices": [{**asdict(one.device), "count": one.count} for one in report.devices],
        "assumptions": ASSUMPTIONS,
    }
    return json.dumps(fields, indent=2) + "\n"


def ratios(report: Report) -> dict[str, float] | None:
    """Return the model's numbers over those of DeepSeek-V3.2; None for that model itself."""
    if report.baseline is None:
        return None
    ours, theirs = report.model, report.baseline
    return {
        "weights": ours.weights.num_bytes / theirs.weights.num_bytes,
        "cache": ours.cache.num_bytes / theirs.cache.num_bytes,
        "flops_plain": ours.flops.plain / theirs.flops.plain,
        "flops_fp8_equivalent": ours.flops.fp8_equivalent / theirs.flops.fp8_equivalent,
    }


def _drafter_estimate(model: Model, settings: EstimationSettings) -> DrafterEstimate | None:
    shape = model.shape
    if not isinstance(shape, DeepseekV4Shape) or shape.drafter is None:
        return None
    drafter = shape.drafter
    return DrafterEstimate(
        num_stages=drafter.num_stages,
        block_size=drafter.block_size,
        weights=count_weights(drafter_tensors(shape, drafter), model.quantization, settings.weight_format),
        cache=count_drafter_cache(shape, drafter, settings.context, settings.batch_size, settings.cache_format),
        release=model.drafter_release,
    )


def _estimate_fields(estimate: Estimate) -> dict[str, Any]:
    drafter = estimate.drafter
    return {
        "name": estimate.name,
        "max_context": estimate.max_context,
        "num_bytes": estimate.num_bytes,
        "weights": _weight_fields(estimate.weights),
        "cache": _cache_fields(estimate.cache),
        "flops": {
            "plain": estimate.flops.plain,
            "fp8_equivalent": estimate.flops.fp8_equivalent,
            "parts": {name: asdict(part) for name, part in estimate.flops.parts.items()},
        },
        "drafter": None
        if drafter is None
        else {
            "num_stages": drafter.num_stages,
            "block_size": drafter.block_size,
            "release": drafter.release,
            "weights": _weight_fields(drafter.weights),
            "cache": _cache_fields(drafter.cache),
        },
    }


def _weight_fields(weights: Weights) -> dict[str, Any]:
    return {
        "num_parameters": weights.num_parameters,
        "num_active_parameters": weights.num_active_parameters,
        "num_bytes": weights.num_bytes,
        "parts": {name: asdict(part) for name, part in weights.parts.items()},
    }


def _cache_fields(cache: KVCache) -> dict[str, Any]:
    return {
        "num_bytes": cache.num_bytes,
        "bytes_per_sequence": cache.bytes_per_sequence,
        "bytes_per_token": cache.bytes_per_token,
        "parts": {name: asdict(part) for name, part in cache.parts.items()},
    }
