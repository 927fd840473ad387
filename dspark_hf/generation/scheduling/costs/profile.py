"""Which measured costs belong to a call of `generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers.utils import logging

from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.fast_passes import fast_passes
from dspark_hf.generation.scheduling.costs.keys import drafter_key, places, profile_key
from dspark_hf.generation.scheduling.costs.online import OnlineCosts
from dspark_hf.generation.scheduling.costs.storing import ProfileKey, load_profile, profile_path
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable, Point
from dspark_hf.generation.scheduling.costs.workload import StepTimer, disagree, lower_quartile, measure
from dspark_hf.generation.scheduling.interface import CallInfo
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.provenance import describe_run

logger = logging.get_logger(__name__)

_QUICK_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
_QUICK_REPEATS = 3
_QUICK_CONTEXT = 128
# costs that fall by more than noise as steps grow: to this share of a smaller step's
_SUSPICIOUS_FALL = 0.9
# pairs of target and drafter that are remembered
_MOST_KNOWN = 64

# path, time and size of a profile's file; None if there is none
_Stamp = tuple[str, int, int] | None

# what is known of a target and a drafter, and what it was made of
_TABLES: dict[tuple[ProfileKey, str], tuple[tuple[_Stamp, CostTable | None], CostTable | None]] = {}
# what calls have measured on first use, by the file that it stands in for; it ends with the process
_QUICK: dict[tuple[Path, str], CostTable] = {}
_ONLINE: dict[tuple[ProfileKey, str], OnlineCosts] = {}


def online_costs(call: CallInfo) -> OnlineCosts:
    """Return what this process has learned about such a target and drafter, on top of a stored profile, if any."""
    keys = _keys(call)
    costs = _ONLINE.setdefault(keys, OnlineCosts())
    _drop_oldest(_ONLINE)
    # the profile belongs to this call alone: another call with more rows may run at the same time, without one
    return costs.with_profile(_covering_profile(call, keys))


def forget_costs() -> None:
    """Forget the costs that this process has measured and seen; stored profiles stay."""
    _ONLINE.clear()
    _QUICK.clear()
    _TABLES.clear()


def find_profile(call: CallInfo) -> CostTable:
    """Return the profile of the target and the drafter; what is missing is measured for this process, and said once.

    Such a measurement is quick, perhaps beside other programs, so it is not stored. Stored costs go before it.
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
    table = measure_costs(StepTimer(call.target, call.drafter), passes, drafts, repeats=_QUICK_REPEATS)
    hint = "; `dspark-hf profile` measures thoroughly, and stores it" if _can_be_profiled(call.target.model) else ""
    logger.warning_once(
        f"Measured what {type(call.target.model).__name__} costs here in {perf_counter() - start:.1f} s, for this "
        f"process alone{hint}."
    )
    place = profile_path(key), drafter
    _QUICK[place] = _QUICK[place].merged_with(table) if place in _QUICK else table
    _drop_oldest(_QUICK)
    _TABLES.pop((key, drafter), None)
    found = _known(key, drafter)
    assert found is not None
    return found


def describe_costs(target: TargetAdapter) -> dict[str, Any]:
    """Return where costs measured now come from: the target's name, hardware, versions, date."""
    run = describe_run(is_on_cpu=target.device.type == "cpu")
    # without the command line, which inside `generate` is that of another program
    return {
        "target": target.model.config.name_or_path,
        "hardware": run.hardware,
        "num_threads": run.num_threads,
        "versions": run.versions,
        "date": run.date,
        "commit": run.commit,
    }


def measure_calls(
    target: TargetAdapter, drafter: Drafter, passes: list[Point], drafts: list[Point], *, repeats: int
) -> CostTable:
    """Return what passes over one token cost in plain `generate`, and what all others and drafts do in our calls.

    Args:
        target: the target, not entered.
        drafter: the drafter.
        passes: passes of the target.
        drafts: drafts.
        repeats: turns that count.
    """
    with target:
        workload = StepTimer(target, drafter)
        plain = measure_costs(workload, [point for point in passes if point[2] == 1], [], repeats=repeats)
        with fast_passes(target.model, drafter):
            wide = [point for point in passes if point[2] > 1]
            ours = measure_costs(workload, wide, drafts, repeats=repeats)
    return CostTable(CostCurves(plain.verify.points | ours.verify.points), ours.draft)


def measure_costs(
    workload: StepTimer,
    passes: list[Point],
    drafts: list[Point],
    *,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> CostTable:
    """Return the measured costs of passes of the target and of drafting.

    Where they look disturbed they are measured again. What then still cannot be true is lowered, and said.
    """
    # by rows and context, so that caches are built once for each; within these, steps take turns
    verify: dict[Point, float] = {}
    draft: dict[Point, float] = {}
    for shape in dict.fromkeys((rows, context) for rows, context, _ in (*passes, *drafts)):
        steps: list[tuple[Callable[[int, int, int], float], Point]]
        steps = [(workload.verify_seconds, point) for point in passes if point[:2] == shape]
        steps += [(workload.draft_seconds, point) for point in drafts if point[:2] == shape]
        # Measuring must not change what the caller samples. Only where modules draw: putting the generator back would
        # also undo the draws of other threads.
        with torch.random.fork_rng(range(torch.cuda.device_count()), enabled=workload.draws_at_random):
            times = measure(
                steps,
                lambda step: step[0](*step[1]),
                repeats=repeats,
                advance=advance,
                is_doubtful=lambda times: any(map(disagree, times.values())) or _falls(times),
            )
        for (run, point), seconds in times.items():
            (verify if run == workload.verify_seconds else draft)[point] = seconds
    table = CostTable(CostCurves(verify), CostCurves(draft))
    if table.doubt is not None:
        logger.warning(
            f"Measured {table.doubt}, time and again: other programs must have run here. Used the lower cost for both."
        )
    return table.without_doubt()


def _falls(times: dict[tuple[Callable[[int, int, int], float], Point], list[float]]) -> bool:
    """Return whether a larger step of the same kind costs less than a smaller one by more than noise."""
    costs = {step: lower_quartile(samples) for step, samples in times.items()}
    return any(
        run == other_run and larger[2] > point[2] and costs[other_run, larger] < _SUSPICIOUS_FALL * cost
        for (run, point), cost in costs.items()
        for other_run, larger in costs
    )


def _keys(call: CallInfo) -> tuple[ProfileKey, str]:
    return profile_key(call.target), drafter_key(call.drafter)


def _covering_profile(call: CallInfo, keys: tuple[ProfileKey, str]) -> CostTable | None:
    table = _known(*keys)
    is_enough = table is not None and table.covers(call.num_rows, call.max_drafts, _quick_context(call))
    return table if is_enough else None


def _known(key: ProfileKey, drafter: str) -> CostTable | None:
    """Return what is stored, and measured by this process; the file is read when it is new or has changed."""
    path = profile_path(key)
    stamp, quick = _stamp(path), _QUICK.get((path, drafter))
    known = _TABLES.get((key, drafter))
    if known is None or known[0] != (stamp, quick):
        stored = None if stamp is None else load_profile(key, drafter)
        # what was stored may have been measured thoroughly
        both = quick.merged_with(stored) if quick and stored else quick or stored
        known = _TABLES[key, drafter] = (stamp, quick), both
        _drop_oldest(_TABLES)
    return known[1]


def _drop_oldest(known: dict[Any, Any]) -> None:
    """Keep the latest entries: a process that goes through many models must not remember all of them."""
    # a copy, since other threads may add
    for keys in list(known)[:-_MOST_KNOWN]:
        known.pop(keys, None)


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return str(path), found.st_mtime_ns, found.st_size


def _quick_context(call: CallInfo) -> int:
    context = max(_QUICK_CONTEXT, call.prompt_length)
    limit = getattr(call.target.config, "max_position_embeddings", None)
    return context if limit is None else max(min(context, limit - call.max_drafts - 1), 1)


def _can_be_profiled(model: Any) -> bool:
    """Return whether `dspark-hf profile` can load such a model: from a folder or the hub, onto one device."""
    return bool(model.config.name_or_path) and len(places(model)) == 1
