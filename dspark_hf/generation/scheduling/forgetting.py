"""Begin anew."""

from __future__ import annotations

from dspark_hf.generation.scheduling.adaptive.memory import forget_drafters
from dspark_hf.generation.scheduling.costs.profile import forget_costs


def forget() -> None:
    """Forget what this process has learnt of drafters and costs, as after a start; stored profiles stay."""
    forget_drafters()
    forget_costs()
