"""Schedulers: how many drafts a round makes, and how many of them it verifies.

`docs/scheduling.md` says what each scheduler may look at, and why the output's distribution stays exact.
"""

from __future__ import annotations

import warnings
from typing import Any

from dspark_hf.generation.scheduling.adaptive.memory import forget_drafters
from dspark_hf.generation.scheduling.adaptive.scheduler import AdaptiveScheduler
from dspark_hf.generation.scheduling.asynchronous import AsynchronousScheduler
from dspark_hf.generation.scheduling.costs.profile import forget_costs
from dspark_hf.generation.scheduling.fixed import FixedScheduler
from dspark_hf.generation.scheduling.hardware_aware import HardwareAwareScheduler
from dspark_hf.generation.scheduling.interface import Batch, CallInfo, RoundOutcome, Schedule, Scheduler
from dspark_hf.generation.scheduling.threshold import ThresholdScheduler

__all__ = [
    "AdaptiveScheduler",
    "AsynchronousScheduler",
    "Batch",
    "CallInfo",
    "FixedScheduler",
    "HardwareAwareScheduler",
    "RoundOutcome",
    "Schedule",
    "Scheduler",
    "ThresholdScheduler",
    "reset_learned_state",
]


def reset_learned_state() -> None:
    """Forget what this process has learned about drafters and costs; stored profiles stay."""
    forget_drafters()
    forget_costs()


def __getattr__(name: str) -> Any:
    renamed = {"Call": CallInfo, "Outcome": RoundOutcome, "forget": reset_learned_state}
    if name not in renamed:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: Any = renamed[name]
    warnings.warn(f"`{name}` is called `{found.__name__}` now. Use that name.", DeprecationWarning, stacklevel=2)
    return found
