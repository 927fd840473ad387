"""The default scheduler: draft as far as that pays, and not at all where it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from transformers.utils import logging

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.drafting.lookup import Offer
from dspark_hf.generation.scheduling.adaptive.memory import DrafterState, remembered, remembered_matches
from dspark_hf.generation.scheduling.adaptive.planning import Plan, make_plan
from dspark_hf.generation.scheduling.confidence import OnlineConfidence
from dspark_hf.generation.scheduling.costs.online import Costs, OnlineCosts
from dspark_hf.generation.scheduling.costs.profile import online_costs
from dspark_hf.generation.scheduling.defaults import (
    DEAREST_WIDTH,
    DOUBT,
    FEW_BLOCKS,
    FEW_DRAFTS,
    FEW_TOKENS,
    FEW_TREES,
    MOST_OF_TREE,
    MOST_SURPRISE,
    PLAN_EVERY,
    REQUIRED_GAIN,
    TREE_GAIN,
    TREE_LEVELS,
    UNKNOWN_CHANCE,
)
from dspark_hf.generation.scheduling.interface import Batch, CallInfo, Choice, RoundOutcome, Schedule, Scheduler
from dspark_hf.generation.scheduling.sources import DrafterPlan, Rate, Trials, choose_sources
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
    learns_costs = True

    def __init__(self, *, costs: Costs | None = None):
        self.costs = costs

    def start(self, call: CallInfo) -> Schedule:
        schedule = _Adaptive(self.costs or online_costs(call), remembered(call), call)
        schedule.match_chances = remembered_matches(call)
        return schedule


class _Mode(Enum):
    plain = "plain"
    # plain steps that the others are compared with
    comparing = "comparing"
    looking_up = "looking up"
    trial = "trial"
    drafting = "drafting"


class _Adaptive(Schedule):
    wants_margins = True

    def __init__(self, costs: Costs, memory: DrafterState, call: CallInfo):
        self._costs = costs
        self._memory = memory
        # a tree takes the drafter about as long as one draft more than it can make in a chain, until it is timed
        self._tree_size = call.max_drafts + 1 if call.may_branch else 0
        # whether this round's drafts branch, and whether only to see what they, or a chain, would give
        self._branches = False
        # as of the last plan
        self._width_is_cheap = False
        self._is_trying = False
        self._tree: list[float] = []
        self._source = OnlineConfidence(memory.estimator)
        self._mode = _Mode.plain
        self._num_rounds = 0
        # the better one of chain and tree
        self._plan: Plan | None = None
        self._better: tuple[bool, Plan, list[float]]
        self._plan_is_for: tuple[int, ...] = ()
        self._has_logged = False
        # of the plan, per row
        self._gains: list[float] = []
        self._rate = Rate()
        self._passes: list[float] = []
        self._passes_are_for: tuple[int, ...] = ()
        self._lookup_trials = Trials()

    def num_drafts(self, batch: Batch) -> int:
        self._mode = _Mode.plain
        if batch.max_drafts < 1:
            return 0
        plan, parking = self._current_plan(batch), self._memory.parking(batch.num_rows)
        # trees may pay where chains do not
        is_unknown = self._width_is_cheap and self._memory.recent_trees.num_trees < FEW_TREES
        promises = plan.rate > self._required_gain(batch) * plan.plain_rate
        if (promises or is_unknown) and not parking.is_parked:
            is_busy = not parking.is_plain_step_due()
            self._mode = _Mode.drafting if is_busy else _Mode.comparing
            self.parked_because = None
            if is_busy and not is_unknown and not self._is_worth_its_time(batch, plan):
                self._mode = _Mode.plain
            elif is_busy:
                self._take_turns()
        elif parking.is_trial_due():
            self._mode = _Mode.trial
            self._take_turns()
        else:
            # told once: the numbers hardly change while nothing is drafted
            self.parked_because = self.parked_because or self._explain(batch, plan, has_lost=parking.is_parked)
        return 0 if self._mode in (_Mode.plain, _Mode.comparing) else self._num_planned(batch)

    def _num_planned(self, batch: Batch) -> int:
        """Return how many drafts the round's kind of drafts is to have."""
        assert self._plan is not None
        if self._is_trying:
            return min(batch.max_drafts, self._most_drafts(batch))
        return min(self._plan.num_drafts, self._most_drafts(batch))

    def _knows_cheap_width(self, batch: Batch) -> bool:
        """Return whether trees are worth a thought: where passes are known to be wide for little.

        Elsewhere the few that show what trees would give cost more than trees could ever bring.
        """
        costs, rows, length = self._costs, batch.num_rows, batch.context_length
        if not self._tree_size or (isinstance(costs, OnlineCosts) and not costs.knows(rows)):
            return False
        wide, narrow = (costs.verify_seconds(rows, width, length) for width in (self._tree_size, 1))
        return wide <= DEAREST_WIDTH * narrow

    def _take_turns(self) -> None:
        """Draft the kind of drafts that is not in use, chain or tree, if it is its turn to show what it would give."""
        # chains are always worth a look
        may_try = self._branches or self._width_is_cheap
        trees, chains = self._memory.recent_trees, self._memory.recent_margins
        # one unlucky chain must not keep trees in use
        num_tried = chains.num_blocks if self._branches else trees.num_trees
        self._is_trying = may_try and trees.is_turn(num_tried)
        self._branches = self._branches != self._is_trying

    def num_branching(self, batch: Batch) -> int:
        # all that may be of use: what is not verified still tells what it would have given
        return MOST_OF_TREE if self._branches else 0

    def _drafting_seconds(self, batch: Batch, count: int) -> float:
        size = self._tree_size if self._branches else count
        return self._costs.draft_seconds(batch.num_rows, size, batch.context_length)

    def _is_worth_its_time(self, batch: Batch, plan: Plan) -> bool:
        """Return whether drafts add more tokens than their time is worth where much comes from elsewhere.

        Beside lookups that give many tokens at once, what drafting adds may be more than plain decoding gives, and yet
        less than the same time brings in other rounds.
        """
        rate = self._rate.value(plan.rate, 1 / plan.plain_rate)
        if rate <= plan.rate:
            return True
        count = plan.num_drafts
        passes = self._seconds_of_passes(batch, count)
        drafting = self._drafting_seconds(batch, count)
        worth, tokens = 0.0, 0.0
        for level in range(1, count + 1):
            tokens += batch.num_live * self._gains[level - 1]
            worth = max(worth, tokens - rate * (drafting + passes[level] - passes[0]))
        return worth > 0

    def _required_gain(self, batch: Batch) -> float:
        """Return from which speed on drafting is worth it, plain decoding being 1: less while costs are in doubt."""
        if not isinstance(self._costs, OnlineCosts):
            return REQUIRED_GAIN
        return REQUIRED_GAIN / (1 + DOUBT * 0.5 ** self._costs.num_drafted(batch.num_rows))

    def _most_drafts(self, batch: Batch) -> int:
        """Return how far a pass may go: if widths are dear here, no great step is made to find out."""
        few = min(max(FEW_TOKENS // batch.num_rows - 1, 1), FEW_DRAFTS)
        widest = self._costs.widest(batch.num_rows) if isinstance(self._costs, OnlineCosts) else math.inf
        limits = batch.limits + batch.rooms + ((MOST_OF_TREE,) if self._branches else ())
        return int(min(max(few, 2 * widest - 1), max(limits)))

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

    def choose(self, batch: Batch, offers: Sequence[Offer]) -> Choice:
        num_drafts = self.num_drafts(batch)
        is_learning = self._mode in (_Mode.comparing, _Mode.trial)
        # what is to be learned of the drafter, or of plain steps, must not be mixed with anything else: it waits for a
        # round in which nothing is worth looking up, beside drafts where these are known to pay
        weighed = self._num_planned(batch) if self._mode is _Mode.comparing else 0 if is_learning else num_drafts
        choice = self._best_choice(batch, offers, weighed)
        if is_learning and (choice.num_drafts or not choice.num_looked_up):
            return Choice(num_drafts)
        if choice.num_looked_up and not choice.num_drafts:
            self._mode = _Mode.looking_up
        return choice

    def _best_choice(self, batch: Batch, offers: Sequence[Offer], num_drafts: int) -> Choice:
        rows = batch.num_rows
        most = self._most_drafts(batch)
        offers = [offer.up_to(most) for offer in offers]
        passes = self._seconds_of_passes(batch, max(num_drafts, *(len(offer.token_ids) for offer in offers)))
        usual = batch.num_live / passes[0]
        plan = None
        if num_drafts and self._plan is not None:
            usual = max(usual, self._plan.rate)
            plan = DrafterPlan(self._gains[:num_drafts], self._drafting_seconds(batch, num_drafts))
        # rows that wait have no room
        are_live = [limit > 0 for limit in batch.limits]
        rate = max(usual, self._rate.value(usual, passes[0]))
        choice = choose_sources(offers, plan, are_live, passes, rate)
        # wide passes may cost less than narrow ones, or a disturbed one, let expect
        taken = choice.num_looked_up if choice else (0,) * rows
        passed_over = max(
            offer.expected(len(passes)) - offer.expected(count) for offer, count in zip(offers, taken, strict=True)
        )
        if self._lookup_trials.is_due(passed_over):
            choice = Choice(0, tuple(len(offer.token_ids) for offer in offers))
        return choice or Choice(num_drafts)

    def _seconds_of_passes(self, batch: Batch, most: int) -> list[float]:
        """Return the seconds of passes over the anchor and at least `most` drafts, as of the last plan."""
        is_for = (batch.num_rows, self._num_rounds // PLAN_EVERY)
        if self._passes_are_for != is_for or len(self._passes) <= most:
            rows, length = batch.num_rows, batch.context_length
            most = max(most, *batch.limits, *batch.rooms, MOST_OF_TREE if self._width_is_cheap else 0)
            widths, costs = range(1, most + 2), self._costs
            if isinstance(costs, OnlineCosts):
                passes = costs.seconds_of_passes(rows, widths, length)
            else:
                passes = [costs.verify_seconds(rows, width, length) for width in widths]
            # a plain step costs no more than a pass over drafts, whatever noise may say
            passes[0] = min(passes)
            self._passes, self._passes_are_for = passes, is_for
        return self._passes

    def _current_plan(self, batch: Batch) -> Plan:
        recent_margins, recent_trees = self._memory.recent_margins, self._memory.recent_trees
        num_blocks = recent_margins.num_blocks + (recent_trees.num_trees if self._tree_size else 0)
        # the first blocks change the plan most; costs are learned in rounds without drafts too
        age = min(num_blocks, FEW_BLOCKS), self._num_rounds // PLAN_EVERY
        is_for = (batch.num_rows, batch.num_live, batch.max_drafts, *age)
        if self._plan is None or self._plan_is_for != is_for:
            # costs have been learned since
            self._passes_are_for = ()
            self._width_is_cheap = self._knows_cheap_width(batch)
            gains = recent_margins.gains(batch.max_drafts, self._memory.estimator, self._memory.shown)
            chain = self._plan_for(batch, gains, range(1, batch.max_drafts + 1))
            self._better = False, *chain
            if recent_trees.num_trees >= FEW_TREES and self._width_is_cheap:
                gains = recent_trees.gains()
                tree = self._plan_for(batch, gains, [self._tree_size] * gains.shape[1])
                if tree[0].rate >= TREE_GAIN * chain[0].rate:
                    self._better = True, *tree
            self._plan_is_for = is_for
        self._branches, self._plan, self._gains = self._better
        self._is_trying = False
        return self._plan

    def _plan_for(self, batch: Batch, gains: NDArray[np.float64], sizes: Sequence[int]) -> tuple[Plan, list[float]]:
        """Return the plan for blocks with such `gains` `(N, K)` a row, and their means.

        The drafter takes as long for 1 to K drafts as for chains of `sizes`.
        """
        rows, length = batch.num_rows, batch.context_length
        passes = self._seconds_of_passes(batch, len(sizes))[: len(sizes) + 1]
        drafting = {size: self._costs.draft_seconds(rows, size, length) for size in set(sizes)}
        plan = make_plan(batch.num_live * gains, batch.num_live, [drafting[size] for size in sizes], passes)
        return plan, gains.mean(0).tolist()

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        if self._mode is _Mode.looking_up:
            # as many as were worth it, which no draft was needed for to know
            return batch.cut(drafted.num_drafts)
        gains: list[float] = possible_survival(self._source.read(drafted), batch).sum(0).tolist()
        if self._mode is _Mode.drafting and self._plan is not None and not self._is_trying:
            level = self._plan.admit(gains)
            # behind the drafter's last draft is only what was looked up
            return batch.cut(level if level < drafted.num_modelled_drafts else drafted.num_drafts)
        # a trial verifies everything, to see what becomes of the drafts
        return batch.cut(len(gains))

    def admit_tree(self, drafted: DraftedBlock, batch: Batch) -> int:
        if not self._tree_size:
            return drafted.num_drafts
        known = drafted.chances
        self._tree = [UNKNOWN_CHANCE] * drafted.num_drafts if known is None else known[0].tolist()
        most = min(self._num_planned(batch), drafted.num_drafts)
        if self._is_trying or self._mode is not _Mode.drafting or self._plan is None:
            return most
        level = self._plan.admit(self._memory.recent_trees.chances(self._tree))
        # a plan may end between two of them
        return next((one for one in TREE_LEVELS if level <= one <= most), _level_below(most))

    def observe(self, outcome: RoundOutcome) -> None:
        self._num_rounds += 1
        self._source.learn(outcome)
        if isinstance(self._costs, OnlineCosts):
            self._costs.observe(outcome)
        if outcome.num_drafted:
            self._remember(outcome)
        self._count(outcome)

    def observe_tree(self, outcome: RoundOutcome) -> None:
        if not self._tree_size:
            # trees were asked for, whatever they cost
            return
        self._num_rounds += 1
        outcome = replace(outcome, num_drafted=self._tree_size)
        assert outcome.places is not None
        if outcome.batch.max_drafts == self._tree_size - 1:
            # near its end a row has fewer slots
            self._memory.recent_trees.learn(self._tree, outcome.num_verified[0], outcome.places)
        if isinstance(self._costs, OnlineCosts):
            self._costs.observe(outcome)
        self._count(outcome)

    def compare(self, outcome: RoundOutcome) -> None:
        if outcome.places is not None:
            outcome = replace(outcome, num_drafted=self._tree_size)
        rows, length, costs = outcome.batch.num_rows, outcome.batch.context_length, self._costs
        if isinstance(costs, OnlineCosts) and not costs.has_timed():
            return
        # what such a round usually takes: its own time is compared with costs that are known as well
        seconds = costs.draft_seconds(rows, outcome.num_drafted, length) if outcome.num_drafted else 0.0
        is_known = self._passes_are_for[:1] == (rows,) and len(self._passes) >= outcome.width
        seconds += self._passes[outcome.width - 1] if is_known else costs.verify_seconds(rows, outcome.width, length)
        self._rate.add(outcome.batch.num_live + sum(outcome.num_accepted), seconds)

    def _remember(self, outcome: RoundOutcome) -> None:
        # a row near its end, or one that waits, is not like rounds to come
        margins, limits, count = self._source.margins, outcome.batch.limits, outcome.num_drafted
        margins = [margins[i][:count] for i in outcome.modelled_rows if limits[i] >= count]
        if margins:
            self._memory.recent_margins.add(margins)

    def _count(self, outcome: RoundOutcome) -> None:
        parking = self._memory.parking(outcome.batch.num_rows)
        if isinstance(self._costs, OnlineCosts) and not self._costs.has_timed():
            # there is nothing to compare with yet
            return
        if self._mode in (_Mode.plain, _Mode.comparing):
            parking.count_plain()
        elif self._mode is _Mode.drafting and self._plan is not None:
            parking.count_drafted(outcome.batch.num_rows, _gain(outcome, self._costs))
        elif self._mode is _Mode.trial and self._plan is not None:
            parking.count_trial(has_paid=_gain(outcome, self._costs) > 0)
            self._memory.recent_margins.forget_old()
            self._plan = None


def _level_below(count: int) -> int:
    return max(one for one in TREE_LEVELS if one <= count)


def _gain(outcome: RoundOutcome, costs: Costs) -> float:
    """Return how many more tokens per row a round gave than plain steps would have given in its time.

    The time of a plain step is a median, so other programs hardly change it, but they can make a single round very
    slow. The round's time is therefore clipped to be near what such rounds usually take.

    Rows that looked drafts up are left out: the drafter gained nothing for them.
    """
    rows, length = outcome.batch.num_rows, outcome.batch.context_length
    verifying = costs.verify_seconds(rows, outcome.width, length)
    usual = verifying + costs.draft_seconds(rows, outcome.num_drafted, length)
    seconds = outcome.draft_seconds + outcome.other_seconds
    seconds = min(max(seconds, usual / MOST_SURPRISE), usual * MOST_SURPRISE)
    asked = outcome.modelled_rows
    num_live = outcome.batch.num_live - (rows - len(asked))
    tokens_per_row = 1 + sum(outcome.num_accepted[i] for i in asked) / max(num_live, 1)
    return tokens_per_row - seconds / min(costs.verify_seconds(rows, 1, length), verifying)
