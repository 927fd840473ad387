"""What a process remembers of a drafter from one call of `generate` to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from dspark_hf.generation.drafting import Drafter
from dspark_hf.generation.scheduling.estimator import AcceptanceEstimator
from dspark_hf.generation.scheduling.experience import Experience
from dspark_hf.generation.scheduling.interface import Call
from dspark_hf.generation.scheduling.parking import Parking


@dataclass
class DrafterMemory:
    """How a drafter fares: the fit of its acceptance, its recent blocks, and when it was last tried."""

    estimator: AcceptanceEstimator = field(default_factory=AcceptanceEstimator)
    experience: Experience = field(default_factory=Experience)
    _parking: dict[int, Parking] = field(default_factory=dict)

    def parking(self, num_rows: int) -> Parking:
        """Return what is known of batches of about so many rows: what loses with sixteen may pay with one."""
        return self._parking.setdefault(num_rows.bit_length(), Parking())


_MEMORIES: WeakKeyDictionary[Drafter, dict[tuple[str, bool], DrafterMemory]] = WeakKeyDictionary()


def forget_drafters() -> None:
    """Begin anew with all drafters, as a new process does."""
    _MEMORIES.clear()


def remembered(call: Call) -> DrafterMemory:
    """Return what is known of the call's drafter for such a target, greedy or sampling; it is updated in place."""
    by_use = _MEMORIES.setdefault(call.drafter, {})
    return by_use.setdefault((type(call.target.model).__name__, call.is_sampling), DrafterMemory())
