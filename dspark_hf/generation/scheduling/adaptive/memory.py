"""What a process remembers of a drafter from one call of `generate` to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.scheduling.adaptive.experience import Experience
from dspark_hf.generation.scheduling.adaptive.parking import Parking
from dspark_hf.generation.scheduling.estimator import AcceptanceEstimator
from dspark_hf.generation.scheduling.interface import Call
from dspark_hf.generation.scheduling.locking import in_turns


@dataclass
class DrafterMemory:
    """How a drafter fares: the fit of its acceptance, its recent blocks, and when it was last tried."""

    estimator: AcceptanceEstimator = field(default_factory=AcceptanceEstimator)
    experience: Experience = field(default_factory=Experience)
    _parking: dict[int, Parking] = field(default_factory=dict)

    @in_turns
    def parking(self, num_rows: int) -> Parking:
        """Return what is known of batches of about so many rows: what loses with sixteen may pay with one."""
        return self._parking.setdefault(num_rows.bit_length(), Parking())


# by target, and there by whether tokens are sampled
_Memories = WeakKeyDictionary[PreTrainedModel, dict[bool, DrafterMemory]]

_MEMORIES: WeakKeyDictionary[Drafter, _Memories] = WeakKeyDictionary()


def forget_drafters() -> None:
    """Begin anew with all drafters, as a new process does."""
    _MEMORIES.clear()


@in_turns
def remembered(call: Call) -> DrafterMemory:
    """Return what is known of the call's drafter with its target, greedy or sampling; it is updated in place."""
    by_target: _Memories = _MEMORIES.setdefault(call.drafter, WeakKeyDictionary())
    by_use = by_target.setdefault(call.target.model, {})
    return by_use.setdefault(call.is_sampling, DrafterMemory())
