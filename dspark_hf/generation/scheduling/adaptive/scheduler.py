"""The default scheduler: draft as far as that pays, and not at all where it does not."""

from __future__ import annotations

from enum import Enum

from transformers.utils import logging

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling.adaptive.memory import DrafterState, remembered
from dspark_hf.generation.scheduling.adaptive.planning import Plan, make_plan
from dspark_hf.generation.scheduling.confidence import OnlineConfidence
from dspark_hf.generation.scheduling.costs.online import Costs, OnlineCosts
from dspark_hf.generation.scheduling.costs.profile import online_costs
from dspark_hf.generation.scheduling.defaults import (
    FEW_BLOCKS,
    FEW_DRAFTS,
    FEW_TOKENS,
    MOST_SURPRISE,
    PLAN_EVERY,
    REQUIRED_GAIN,
)
from dspark_hf.generation.scheduling.interface import Batch, CallInfo, RoundOutcome, Schedule, Scheduler
from dspark_hf.generation.scheduling.survival import possible_survival

logger = logging.get_logger(__name__)


class AdaptiveScheduler(Scheduler):
    """Decide whether to draft, how far, and what to verify, from measured costs and from the drafts' success so far.

    Costs come from this process's own rounds, remembered from call to call, and from this machine's profile if there
    is one. Where drafting does not pay it stops ("parks") and is tried again from time to time, less and less often.
    Confidence comes from the margin between the two best draft logits.

    Args:
        costs: what passes cost; default: as described above.
    """

    name = "adaptive"

    def __init__(self, *, costs: Costs | None = None):
        self.costs = costs

    def start(self, call: CallInfo) -> Schedule:
        return _Adaptive(self.costs or online_costs(call), remembered(call))


class _Mode(Enum):
    learning = "learning"
    plain = "plain"
    trial = "trial"
    drafting = "drafting"


class _Adaptive(Schedule):
    wants_margins = True

    def __init__(self, costs: Costs, memory: DrafterState):
        self._costs = costs
        self._memory = memory
        self._source = OnlineConfidence(memory.estimator)
        self._mode = _Mode.plain
        self._num_rounds = 0
        self._plan: Plan | None = None
        self._plan_is_for: tuple[int, ...] = ()
        self._has_logged = False

    def num_drafts(self, batch: Batch) -> int:
        self._mode = _Mode.plain
        if batch.max_drafts < 1:
            return 0
        if isinstance(self._costs, OnlineCosts) and not self._costs.knows(batch.num_rows):
            return self._learning_drafts(batch)
        plan, parking = self._current_plan(batch), self._memory.parking(batch.num_rows)
        if plan.rate > REQUIRED_GAIN * plan.plain_rate and not parking.is_parked:
            is_busy = not parking.is_plain_step_due()
            self._mode = _Mode.drafting if is_busy else _Mode.plain
            self.parked_because = None
        elif parking.is_trial_due():
            self._mode = _Mode.trial
        else:
            # told once: the numbers hardly change while nothing is drafted
            self.parked_because = self.parked_because or self._explain(batch, plan, has_lost=parking.is_parked)
        return 0 if self._mode is _Mode.plain else plan.num_drafts

    def _explain(self, batch: Batch, plan: Plan, *, has_lost: bool) -> str:
        """Return why drafting is parked, and log it once a call."""
        rows, length, width = batch.num_rows, batch.context_length, 1 + plan.num_drafts
        passes = self._costs.verify_seconds(rows, width, length) / self._costs.verify_seconds(rows, 1, length)
        rate = plan.rate / plan.plain_rate
        promise = f"drafting promises {rate:.2f} x the speed of plain decoding, less than {REQUIRED_GAIN} x"
        why = "drafting lost time in its last rounds" if has_lost else promise
        reason = f"{why}; a pass over {width} tokens a row costs {passes:.2f} plain passes here"
        if not self._has_logged:
            logger.info("Drafting is parked: %s.", reason)
        self._has_logged = True
        return reason

    def _learning_drafts(self, batch: Batch) -> int:
        """Alternate two plain steps and two short blocks: the first of each pair also pays for the change."""
        if self._num_rounds % 4 < 2:
            return 0
        self._mode = _Mode.learning
        return min(batch.max_drafts, max(FEW_TOKENS // batch.num_rows - 1, 1), FEW_DRAFTS)

    def _current_plan(self, batch: Batch) -> Plan:
        recent_margins = self._memory.recent_margins
        num_blocks = recent_margins.num_blocks
        # the first blocks change the plan most
        age = num_blocks if num_blocks < FEW_BLOCKS else num_blocks // PLAN_EVERY + FEW_BLOCKS
        is_for = (batch.num_rows, batch.num_live, batch.max_drafts, age)
        if self._plan is None or self._plan_is_for != is_for:
            rows, length = batch.num_rows, batch.context_length
            counts = range(1, batch.max_drafts + 1)
            passes = [self._costs.verify_seconds(rows, 1 + level, length) for level in (0, *counts)]
            # a plain step costs no more than a pass over drafts, whatever noise may say
            passes[0] = min(passes)
            self._plan = make_plan(
                batch.num_live * recent_margins.gains(batch.max_drafts, self._memory.estimator),
                batch.num_live,
                [self._costs.draft_seconds(rows, count, length) for count in counts],
                passes,
            )
            self._plan_is_for = is_for
        return self._plan

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        gains: list[float] = possible_survival(self._source.read(drafted), batch).sum(0).tolist()
        if self._mode is _Mode.drafting and self._plan is not None:
            return batch.cut(self._plan.admit(gains))
        # a trial verifies everything, to see what becomes of the drafts
        return batch.cut(len(gains))

    def observe(self, outcome: RoundOutcome) -> None:
        self._num_rounds += 1
        self._source.learn(outcome)
        if isinstance(self._costs, OnlineCosts):
            self._costs.observe(outcome)
        if outcome.num_drafted:
            self._remember(outcome)
        self._count(outcome)

    def _remember(self, outcome: RoundOutcome) -> None:
        # a row near its end, or one that waits, is not like rounds to come
        pairs = zip(self._source.margins, outcome.batch.limits, strict=True)
        margins = [row for row, limit in pairs if limit >= outcome.num_drafted]
        if margins:
            self._memory.recent_margins.add(margins)

    def _count(self, outcome: RoundOutcome) -> None:
        parking = self._memory.parking(outcome.batch.num_rows)
        if self._mode is _Mode.plain:
            parking.count_plain()
        elif self._mode is _Mode.drafting and self._plan is not None:
            parking.count_drafted(outcome.batch.num_rows, _gain(outcome, self._costs))
        elif self._mode is _Mode.trial and self._plan is not None:
            parking.count_trial(has_paid=_gain(outcome, self._costs) > 0)
            self._memory.recent_margins.forget_old()
            self._plan = None


def _gain(outcome: RoundOutcome, costs: Costs) -> float:
    """Return how many more tokens per row a round gave than plain steps would have given in its time.

    The time of a plain step is a median, so other programs hardly change it, but they can make a single round very
    slow. The round's time is therefore clipped to be near what such rounds usually take.
    """
    rows, length = outcome.batch.num_rows, outcome.batch.context_length
    verifying = costs.verify_seconds(rows, outcome.width, length)
    usual = verifying + costs.draft_seconds(rows, outcome.num_drafted, length)
    seconds = outcome.draft_seconds + outcome.other_seconds
    seconds = min(max(seconds, usual / MOST_SURPRISE), usual * MOST_SURPRISE)
    tokens_per_row = 1 + sum(outcome.num_accepted) / max(outcome.batch.num_live, 1)
    return tokens_per_row - seconds / min(costs.verify_seconds(rows, 1, length), verifying)
