"""Which measured costs belong to a call of `generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers.utils import logging

from dspark_hf.generation.scheduling.costs.keys import drafter_key, places, profile_key
from dspark_hf.generation.scheduling.costs.online import OnlineCosts
from dspark_hf.generation.scheduling.costs.storing import ProfileKey, load_profile, profile_path, save_profile
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable, Point
from dspark_hf.generation.scheduling.costs.workload import Workload, measure
from dspark_hf.generation.scheduling.interface import Call
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.provenance import describe_run

logger = logging.get_logger(__name__)

_QUICK_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
_QUICK_REPEATS = 3
_QUICK_CONTEXT = 128

# when and how large a profile's file was; None if there is none
_Stamp = tuple[str, int, int] | None

_TABLES: dict[tuple[ProfileKey, str], tuple[_Stamp, CostTable | None]] = {}
_ONLINE: dict[tuple[ProfileKey, str], OnlineCosts] = {}


def online_costs(call: Call) -> OnlineCosts:
    """Return what this process has seen of such a target and drafter, beside a stored profile; updated in place."""
    keys = _keys(call)
    costs = _ONLINE.setdefault(keys, OnlineCosts())
    # of this call: one with more rows, which another profile covers or none, may run at the same time
    return costs.beside(_covering_profile(call, keys))


def forget_costs() -> None:
    """Begin anew with all costs that this process has seen of its rounds; stored profiles stay."""
    _ONLINE.clear()


def find_profile(call: Call) -> CostTable:
    """Return the profile of the target and the drafter; what is missing is measured, stored, and said once.

    Points that are stored already stay as they are.
    """
    key, drafter = _keys(call)
    known = _covering_profile(call, (key, drafter))
    if known is not None:
        return known
    start = perf_counter()
    rows = sorted({1, call.num_rows})
    widths = [width for width in _QUICK_WIDTHS if width <= call.max_drafts] + [call.max_drafts + 1]
    context = _quick_context(call)
    passes = [(count, context, width) for count in rows for width in widths]
    drafts = [(count, context, size) for count in rows for size in sorted({1, call.max_drafts})]
    table = measure_costs(Workload(call.target, call.drafter), passes, drafts, repeats=_QUICK_REPEATS)
    stored = _known(key, drafter)
    # what was stored may have been measured thoroughly
    table = table if stored is None else table.merged_with(stored)
    what = f"Measured what {type(call.target.model).__name__} costs here in {perf_counter() - start:.1f} s"
    try:
        path = save_profile(key, drafter, table, describe_costs(call.target))
        hint = "; `dspark-hf profile` measures more thoroughly" if _can_be_profiled(call.target.model) else ""
        logger.warning_once(f"{what}, and stored it in {path}{hint}.")
    except OSError as error:
        logger.warning_once(f"{what}. It could not be stored, and is lost with this process. ({error})")
    _TABLES[key, drafter] = _stamp(profile_path(key)), table
    return table


def describe_costs(target: TargetAdapter) -> dict[str, Any]:
    """Return where costs measured now come from: the target's name, hardware, versions, date."""
    run = describe_run(is_on_cpu=target.model.device.type == "cpu")
    # not the command line: within `generate` it is a stranger's
    return {
        "target": target.model.config.name_or_path,
        "hardware": run.hardware,
        "num_threads": run.num_threads,
        "versions": run.versions,
        "date": run.date,
        "commit": run.commit,
    }


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
    for shape in dict.fromkeys((rows, context) for rows, context, _ in (*passes, *drafts)):
        steps: list[tuple[Callable[[int, int, int], float], Point]]
        steps = [(workload.verify_seconds, point) for point in passes if point[:2] == shape]
        steps += [(workload.draft_seconds, point) for point in drafts if point[:2] == shape]
        # what the caller samples must not depend on what was measured; what is put back was taken from other threads
        with torch.random.fork_rng(range(torch.cuda.device_count()), enabled=workload.draws_at_random):
            times = measure(steps, lambda step: step[0](*step[1]), repeats=repeats, advance=advance)
        for (run, point), seconds in times.items():
            (verify if run == workload.verify_seconds else draft)[point] = seconds
    return CostTable(CostCurves(verify), CostCurves(draft))


def _keys(call: Call) -> tuple[ProfileKey, str]:
    return profile_key(call.target), drafter_key(call.drafter)


def _covering_profile(call: Call, keys: tuple[ProfileKey, str]) -> CostTable | None:
    table = _known(*keys)
    is_enough = table is not None and table.covers(call.num_rows, call.max_drafts, _quick_context(call))
    return table if is_enough else None


def _known(key: ProfileKey, drafter: str) -> CostTable | None:
    """Return the stored profile; the file is read when it is new or has changed."""
    stamp = _stamp(profile_path(key))
    known = _TABLES.get((key, drafter))
    if known is None or known[0] != stamp:
        known = _TABLES[key, drafter] = stamp, None if stamp is None else load_profile(key, drafter)
    return known[1]


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return str(path), found.st_mtime_ns, found.st_size


def _quick_context(call: Call) -> int:
    context = max(_QUICK_CONTEXT, call.prompt_length)
    limit = getattr(call.target.config, "max_position_embeddings", None)
    return context if limit is None else max(min(context, limit - call.max_drafts - 1), 1)


def _can_be_profiled(model: Any) -> bool:
    """Return whether `dspark-hf profile` can load such a model: from a folder or the hub, onto one device."""
    return bool(model.config.name_or_path) and len(places(model)) == 1
