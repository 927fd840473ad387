"""Draft as far as this call's own drafts were accepted, whatever the clock says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.drafting.lookup import Offer
from dspark_hf.generation.packing import multiplies_packed
from dspark_hf.generation.scheduling.defaults import (
    ASSUMED_COST_OF_A_BLOCK,
    ASSUMED_COST_OF_A_BLOCK_ON_CPUS,
    ASSUMED_COST_OF_A_TOKEN,
    ASSUMED_COST_OF_A_TOKEN_IN_FP32,
    ASSUMED_COST_OF_WIDTH_IN_FP32,
    COUNT_MEMORY,
    COUNT_TRUST,
    FIRST_TRIAL_GAP,
    LEAST_CHANCE,
    LONGEST_TRIAL_GAP,
    PRIOR_CHANCE,
    REQUIRED_GAIN,
)
from dspark_hf.generation.scheduling.interface import Batch, CallInfo, Choice, RoundOutcome, Schedule, Scheduler
from dspark_hf.generation.scheduling.sources import choose_sources
from dspark_hf.generation.targets.adapter import TargetAdapter


class CountedScheduler(Scheduler):
    """Decide how far to draft from counts alone: how many drafts of each place in a block this call has accepted.

    Nothing is measured and nothing remembered from call to call, so that a seed gives the same sampled text on every
    run. What passes cost is assumed to be usual for the kind of device and the dtype; a call starts from the
    `accept_rates` that are stored with the drafter.
    """

    name = "counted"

    def start(self, call: CallInfo) -> Schedule:
        return _Counted(call.drafter.accept_rates or [PRIOR_CHANCE], _assumed_costs(call.target))


@dataclass(frozen=True)
class _AssumedCosts:
    """What is taken for granted of a machine, as shares of a plain pass: no clock may decide.

    Args:
        block: a block of drafts.
        width: what a pass over several tokens costs more than one over one, however many they are.
        token: a further token of a pass.
    """

    block: float
    width: float
    token: float

    def passes(self, most: int) -> list[float]:
        """Return what a pass costs that verifies 0 drafts, 1 draft and so on up to `most`."""
        return [1.0, *(1 + self.width + self.token * level for level in range(1, most + 1))]


def _assumed_costs(target: TargetAdapter) -> _AssumedCosts:
    """Return what passes and blocks usually cost on such a device, in such a dtype."""
    if target.model.device.type != "cpu":
        return _AssumedCosts(ASSUMED_COST_OF_A_BLOCK, 0.0, ASSUMED_COST_OF_A_TOKEN)
    if target.model.dtype is not torch.float32 or multiplies_packed(target.model):
        return _AssumedCosts(ASSUMED_COST_OF_A_BLOCK_ON_CPUS, 0.0, ASSUMED_COST_OF_A_TOKEN)
    return _AssumedCosts(
        ASSUMED_COST_OF_A_BLOCK_ON_CPUS, ASSUMED_COST_OF_WIDTH_IN_FP32, ASSUMED_COST_OF_A_TOKEN_IN_FP32
    )


class _Counted(Schedule):
    def __init__(self, rates: Sequence[float], costs: _AssumedCosts) -> None:
        self._rates = rates
        self._costs = costs
        # of each place in a block: drafts whose prefix was accepted, and how many of them were
        self._seen: list[float] = []
        self._accepted: list[float] = []
        self._num_parked = 0
        self._gap = FIRST_TRIAL_GAP

    def num_drafts(self, batch: Batch) -> int:
        if batch.max_drafts < 1:
            return 0
        count, rate = self._best(batch.max_drafts)
        if rate > REQUIRED_GAIN or self._num_parked >= self._gap:
            self.parked_because = None
            return count
        self.parked_because = (
            f"drafting promises {rate:.2f} x the speed of plain decoding at usual costs, less than {REQUIRED_GAIN} x"
        )
        return 0

    def choose(self, batch: Batch, offers: Sequence[Offer]) -> Choice:
        num_drafts = self.num_drafts(batch)
        if not self._are_worth_a_pass(batch, offers):
            return Choice(num_drafts)
        if batch.max_drafts and not num_drafts:
            # as without a drafter: what stood before may still go on
            return super().choose(replace(batch, limits=(0,) * batch.num_rows), offers)
        return super().choose(batch, offers)

    def _are_worth_a_pass(self, batch: Batch, offers: Sequence[Offer]) -> bool:
        """Return whether looking these up would bring more than plain steps in the same time."""
        passes = self._costs.passes(max(len(offer.token_ids) for offer in offers))
        are_live = [True] * batch.num_rows
        return choose_sources(offers, None, are_live, passes, REQUIRED_GAIN * batch.num_live) is not None

    def _best(self, most: int) -> tuple[int, float]:
        """Return how many drafts promise most, and how many times the speed of plain decoding that would be."""
        survival, tokens, best = 1.0, 1.0, (1, 0.0)
        for count, cost in enumerate(self._costs.passes(most)[1:], start=1):
            survival *= self._chance(count - 1)
            tokens += survival
            best = max(best, (count, tokens / (cost + self._costs.block)), key=lambda pair: pair[1])
        return best

    def _chance(self, place: int) -> float:
        usual = self._usual(place)
        if place < len(self._seen):
            return (self._accepted[place] + COUNT_TRUST * usual) / (self._seen[place] + COUNT_TRUST)
        last = len(self._seen) - 1
        # what was never verified is as much better or worse than usual as the last place that was
        return min(self._chance(last) * usual / self._usual(last), 1.0) if self._seen else usual

    def _usual(self, place: int) -> float:
        return max(self._rates[min(place, len(self._rates) - 1)], LEAST_CHANCE)

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        return batch.cut(drafted.num_drafts)

    def observe(self, outcome: RoundOutcome) -> None:
        if not outcome.num_drafted:
            self._num_parked += self.parked_because is not None
            return
        for row in outcome.modelled_rows:
            self._count(outcome.num_verified[row], outcome.num_accepted[row])
        # a trial: the next comes later, unless this one changes the verdict
        is_trial = self._num_parked >= self._gap
        self._gap = min(2 * self._gap, LONGEST_TRIAL_GAP) if is_trial else FIRST_TRIAL_GAP
        self._num_parked = 0

    def _count(self, verified: int, accepted: int) -> None:
        for place in range(min(verified, accepted + 1)):
            if place == len(self._seen):
                self._seen.append(0.0)
                self._accepted.append(0.0)
            self._seen[place] = COUNT_MEMORY * self._seen[place] + 1
            self._accepted[place] = COUNT_MEMORY * self._accepted[place] + (place < accepted)
