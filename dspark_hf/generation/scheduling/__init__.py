"""How many drafts to make, and how many of them to verify: by name, or one of these objects.

What each of them may look at, and why the output's distribution is exact all the same, is in `docs/scheduling.md`.
"""

from dspark_hf.generation.scheduling.adaptive.memory import forget_drafters
from dspark_hf.generation.scheduling.adaptive.scheduler import AdaptiveScheduler
from dspark_hf.generation.scheduling.asynchronous import AsynchronousScheduler
from dspark_hf.generation.scheduling.costs.profile import forget_costs
from dspark_hf.generation.scheduling.fixed import FixedScheduler
from dspark_hf.generation.scheduling.hardware_aware import HardwareAwareScheduler
from dspark_hf.generation.scheduling.interface import Batch, Call, Outcome, Schedule, Scheduler
from dspark_hf.generation.scheduling.threshold import ThresholdScheduler

__all__ = [
    "AdaptiveScheduler",
    "AsynchronousScheduler",
    "Batch",
    "Call",
    "FixedScheduler",
    "HardwareAwareScheduler",
    "Outcome",
    "Schedule",
    "Scheduler",
    "ThresholdScheduler",
    "forget",
]


def forget() -> None:
    """Forget what this process has learnt of drafters and costs, as after a start; stored profiles stay."""
    forget_drafters()
    forget_costs()
