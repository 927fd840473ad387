"""Which measured costs belong to a call of `generate`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from transformers.utils import logging

from dspark_hf.generation.drafting import Drafter
from dspark_hf.generation.integration import attention_implementation
from dspark_hf.generation.scheduling.costs import OnlineCosts
from dspark_hf.generation.scheduling.interface import Call
from dspark_hf.generation.target import TargetAdapter
from dspark_hf.generation.workload import Workload
from dspark_hf.profiling.measuring import measure
from dspark_hf.profiling.storing import ProfileKey, load_profile, save_profile
from dspark_hf.profiling.table import CostCurves, CostTable, Point

logger = logging.get_logger(__name__)

# fields of a configuration that say nothing about the time a pass takes
_IRRELEVANT = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "sts_temperatures"}
_QUICK_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
_QUICK_REPEATS = 3
_QUICK_CONTEXT = 128

_TABLES: dict[tuple[ProfileKey, str], CostTable] = {}
_ONLINE: dict[tuple[ProfileKey, str], OnlineCosts] = {}


def profile_key(target: TargetAdapter) -> ProfileKey:
    """Return what the target's costs depend on."""
    model = target.model
    return ProfileKey(
        model=f"{type(model).__name__}-{_fingerprint(model.config)}",
        dtype=str(model.dtype).removeprefix("torch."),
        device=_device_name(model.device),
        attention=attention_implementation(model),
    )


def drafter_key(drafter: Drafter) -> str:
    """Return what a drafter's costs depend on, beside the target's key."""
    return f"{type(drafter).__name__}-{_fingerprint(getattr(drafter, 'config', None))}"


def online_costs(call: Call) -> OnlineCosts:
    """Return what this process has seen of such a target and drafter; it is updated in place."""
    return _ONLINE.setdefault((profile_key(call.target), drafter_key(call.drafter)), OnlineCosts())


def stored_profile(call: Call) -> CostTable | None:
    """Return the profile of the target and the drafter if there is one that covers the call, else None."""
    key = (profile_key(call.target), drafter_key(call.drafter))
    table = _TABLES.get(key) or load_profile(*key)
    if table is None or not table.covers(call.num_rows, call.max_drafts):
        return None
    _TABLES[key] = table
    return table


def find_profile(call: Call) -> CostTable:
    """Return the profile of the target and the drafter; what is missing is measured, stored, and said once."""
    known = stored_profile(call)
    if known is not None:
        return known
    key = (profile_key(call.target), drafter_key(call.drafter))
    start = perf_counter()
    rows = sorted({1, call.num_rows})
    widths = [width for width in _QUICK_WIDTHS if width <= call.max_drafts] + [call.max_drafts + 1]
    context = max(_QUICK_CONTEXT, call.prompt_length)
    passes = [(count, context, width) for count in rows for width in widths]
    drafts = [(count, context, size) for count in rows for size in sorted({1, call.max_drafts})]
    table = measure_costs(Workload(call.target, call.drafter), passes, drafts, repeats=_QUICK_REPEATS)
    stored = load_profile(*key)
    table = table if stored is None else stored.merged_with(table)
    path = save_profile(*key, table)
    _TABLES[key] = table
    logger.warning_once(
        f"Measured what {type(call.target.model).__name__} costs here in {perf_counter() - start:.1f} s, and stored "
        f"it in {path}; `dspark-hf profile` measures more thoroughly."
    )
    return table


def measure_costs(
    workload: Workload,
    passes: list[Point],
    drafts: list[Point],
    *,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> CostTable:
    """Return the measured costs of passes of the target and of drafting."""
    # by size of the context, whose caches are built once, and inside by turns
    verify: dict[Point, float] = {}
    draft: dict[Point, float] = {}
    for shape in dict.fromkeys((rows, context) for rows, context, _ in passes):
        steps: list[tuple[Callable[[int, int, int], float], Point]]
        steps = [(workload.verify_seconds, point) for point in passes if point[:2] == shape]
        steps += [(workload.draft_seconds, point) for point in drafts if point[:2] == shape]
        times = measure(steps, lambda step: step[0](*step[1]), repeats=repeats, advance=advance)
        for (run, point), seconds in times.items():
            (verify if run == workload.verify_seconds else draft)[point] = seconds
    return CostTable(CostCurves(verify), CostCurves(draft))


def _fingerprint(config: Any) -> str:
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    relevant = {name: value for name, value in fields.items() if name not in _IRRELEVANT}
    text = json.dumps(relevant, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}-{torch.get_num_threads()}-threads" if device.type == "cpu" else device.type
