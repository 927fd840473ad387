"""A scheduler that looks at what its drafts led to before it admits them: it must fail every test of exactness."""

from __future__ import annotations

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling import Batch, CallInfo, Schedule, Scheduler
from dspark_hf.generation.scheduling.costs.online import Costs, round_seconds
from dspark_hf.generation.scheduling.survival import best_level, possible_survival


class RetrospectiveScheduler(Scheduler):
    """Verify the levels with the highest throughput of all, which the paper's Appendix A shows to be wrong."""

    name = "retrospective"

    def __init__(self, costs: Costs):
        self.costs = costs

    def start(self, call: CallInfo) -> Schedule:
        return _Retrospective(self.costs)


class _Retrospective(Schedule):
    def __init__(self, costs: Costs):
        self._costs = costs

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        assert drafted.confidence is not None
        gains = possible_survival(drafted.confidence, batch).sum(0).tolist()
        return batch.cut(best_level(gains, batch.num_live, round_seconds(self._costs, batch, len(gains))))
