"""The counterexample of the paper's Appendix A, through the decoding loop.

Target (0.7, 0.3), draft (0.5, 0.5), throughput 1, 0.5 and 0.45 steps per second for 0, 1 and 2 drafts. The second
draft is sure to be accepted behind the first token and sure to be rejected behind the other. A scheduler that looks at
that verifies the first draft only if it is the first token, and writes it in 0.85 of the rounds instead of 0.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dspark_hf.generation.scheduling import (
    AsynchronousScheduler,
    FixedScheduler,
    HardwareAwareScheduler,
    Scheduler,
    ThresholdScheduler,
)
from tests.generation.drafters import MemorylessDrafter
from tests.generation.scheduling.chains import chain_target, first_places
from tests.generation.scheduling.fakes import ClockedAdaptive, ListedCosts
from tests.generation.scheduling.retrospective import RetrospectiveScheduler
from tests.thinning import mostly_slow

P_TARGET = 0.7
NEW_TOKENS = 500
# a correct scheduler is condemned once in two million seeds
NUM_DEVIATIONS = 5.0

# with the numbers of drafts that are verified: exactness must not come from a scheduler's never deciding
SCHEDULERS: dict[str, tuple[Callable[[], Scheduler | None], set[int]]] = {
    "fixed": (FixedScheduler, {2}),
    "threshold": (lambda: ThresholdScheduler(0.5), {1, 2}),
    "threshold above the first draft": (lambda: ThresholdScheduler(0.9), {0}),
    "threshold, online": (lambda: ThresholdScheduler(0.2, confidence="online"), {2}),
    "hardware aware": (lambda: HardwareAwareScheduler(costs=_costs()), {0}),
    "asynchronous": (lambda: AsynchronousScheduler(costs=_costs()), {0, 2}),
    "adaptive": (lambda: ClockedAdaptive(_costs()), {0}),
    "adaptive, cheap drafts": (lambda: ClockedAdaptive(ListedCosts([1.0, 1.4, 1.8])), {0, 1, 2}),
    # by counts: at the costs that it takes for granted these drafts always pay
    "default": (lambda: None, {2}),
}


# each of the others is one of these, or does less with these drafts
QUICK = ("asynchronous", "adaptive, cheap drafts")


def _costs() -> ListedCosts:
    return ListedCosts([1 / 1.0, 1 / 0.5, 1 / 0.45])


def _logits(slot: int, previous: Tensor) -> Tensor:
    even = torch.full((len(previous), 2), 0.5)
    # as the target does, so that the second draft behind token 0 is sure, and its margin says so
    like_target = torch.tensor([P_TARGET, 1 - P_TARGET]).expand(len(previous), 2)
    return torch.where((previous == 0)[:, None] & (slot == 1), like_target, even).log()


def _confidence(slot: int, previous: Tensor) -> Tensor:
    return torch.full(previous.shape, 0.8) if slot == 0 else (previous == 0).float()


def _write(scheduler: Scheduler | None) -> tuple[Tensor, Tensor, set[int]]:
    """Return the text, the first token of every round, and which numbers of drafts were verified."""
    target = chain_target(torch.tensor([[P_TARGET, 1 - P_TARGET]]).expand(2, 2))
    drafter = MemorylessDrafter(_logits, 2, 2, confidence_after=_confidence)
    prompt = torch.tensor([[1]])
    output = target.generate(
        prompt, max_new_tokens=NEW_TOKENS, do_sample=True, assistant_model=drafter, scheduler=scheduler
    )
    statistics = drafter.last_statistics
    assert statistics is not None
    text = output[0, 1:]
    places = first_places([one.num_accepted[0] for one in statistics.rounds])
    return text, text[places], {one.num_verified[0] for one in statistics.rounds}


def _num_deviations(tokens: Tensor, p: float) -> float:
    return abs((tokens == 0).double().mean().item() - p) / math.sqrt(p * (1 - p) / len(tokens))


@pytest.mark.parametrize("name", mostly_slow(SCHEDULERS, QUICK))
def test_text_follows_the_target(name):
    """A scheduler lets what a draft leads to decide whether it is verified."""
    scheduler, expected = SCHEDULERS[name]
    text, firsts, verified = _write(scheduler())
    assert _num_deviations(text, P_TARGET) < NUM_DEVIATIONS
    assert _num_deviations(firsts, P_TARGET) < NUM_DEVIATIONS
    assert verified >= expected


def test_a_search_over_the_current_round_changes_the_text():
    """The test above passes for text that does not follow the target."""
    _, firsts, verified = _write(RetrospectiveScheduler(_costs()))
    assert verified >= {0, 2}
    assert _num_deviations(firsts, P_TARGET) > NUM_DEVIATIONS
    assert _num_deviations(firsts, 0.85) < NUM_DEVIATIONS
