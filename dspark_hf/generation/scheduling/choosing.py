"""From what the user said to a scheduler."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from dspark_hf.generation.scheduling.adaptive.scheduler import AdaptiveScheduler
from dspark_hf.generation.scheduling.asynchronous import AsynchronousScheduler
from dspark_hf.generation.scheduling.counted import CountedScheduler
from dspark_hf.generation.scheduling.fixed import FixedScheduler
from dspark_hf.generation.scheduling.hardware_aware import HardwareAwareScheduler
from dspark_hf.generation.scheduling.interface import Scheduler
from dspark_hf.generation.scheduling.threshold import DEFAULT_THRESHOLD, ThresholdScheduler

SCHEDULERS: dict[str, type[Scheduler]] = {
    scheduler.name: scheduler
    for scheduler in (
        FixedScheduler,
        ThresholdScheduler,
        HardwareAwareScheduler,
        AsynchronousScheduler,
        CountedScheduler,
        AdaptiveScheduler,
    )
}
# these decide by the clock
_TIMED = (HardwareAwareScheduler, AsynchronousScheduler, AdaptiveScheduler)


def choose_scheduler(
    chosen: Any, threshold: float | None, *, is_tensor_parallel: bool = False, must_repeat: bool = False
) -> Scheduler:
    """Return the scheduler of a call.

    Args:
        chosen: a name, a `Scheduler`, or None where the user chose nothing.
        threshold: `assistant_confidence_threshold` if the user set it; 0 means that every draft is verified.
        is_tensor_parallel: whether several processes run the target together, each with a clock of its own.
        must_repeat: whether the text depends on how far is drafted, and a seed is to give the same again.

    Raises:
        ValueError: if the name is none, or the choices contradict each other.
        TypeError: if `chosen` is neither a name nor a scheduler.
    """
    if chosen is None:
        return _implied(threshold, is_tensor_parallel, must_repeat)
    scheduler = _by_name(chosen, threshold) if isinstance(chosen, str) else chosen
    if not isinstance(scheduler, Scheduler):
        raise TypeError(
            f"`scheduler` must be a name or a Scheduler, got {type(chosen).__name__}. Names are "
            f"{', '.join(SCHEDULERS)}."
        )
    if threshold and getattr(scheduler, "threshold", None) != threshold:
        raise ValueError(
            f"`assistant_confidence_threshold` must agree with the scheduler, got {threshold} with "
            f"{scheduler.name!r}. Leave one of them out."
        )
    if is_tensor_parallel and isinstance(scheduler, _TIMED):
        raise ValueError(
            f"`scheduler` must be 'fixed' or 'threshold' under tensor parallelism, got {scheduler.name!r}. The "
            "processes' clocks differ, and so would their decisions."
        )
    return scheduler


def _by_name(name: str, threshold: float | None) -> Scheduler:
    if name not in SCHEDULERS:
        meant = get_close_matches(name, SCHEDULERS, 1)
        remedy = f"Did you mean {meant[0]!r}?" if meant else "Correct the name."
        raise ValueError(f"`scheduler` must be one of {', '.join(SCHEDULERS)}, got {name!r}. {remedy}")
    if name == ThresholdScheduler.name:
        return ThresholdScheduler(DEFAULT_THRESHOLD if threshold is None else threshold)
    return SCHEDULERS[name]()


def _implied(threshold: float | None, is_tensor_parallel: bool, must_repeat: bool) -> Scheduler:
    if threshold:
        return ThresholdScheduler(threshold, confidence="head")
    if threshold == 0 or is_tensor_parallel:
        return FixedScheduler()
    return CountedScheduler() if must_repeat else AdaptiveScheduler()
