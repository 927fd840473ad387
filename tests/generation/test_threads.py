"""Threads that generate at the same time: each as if it were alone."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.scheduling.adaptive.memory import DrafterState
from dspark_hf.generation.scheduling.costs.online import OnlineCosts
from dspark_hf.generation.scheduling.interface import Batch, RoundOutcome
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.closeness import assert_same_up_to_rounding
from tests.generation.prompts import ragged_prompts
from tests.thinning import slow
from tests.tiny import tiny_target

NUM_THREADS = 3


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Let threads interrupt each other wherever they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def _together(work: Callable[[int], Any]) -> list[Any]:
    """Return what `work` returns in each of several threads that start at once."""
    barrier = threading.Barrier(NUM_THREADS)

    def begin(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(begin, range(NUM_THREADS)))


def _elsewhere(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@torch.no_grad()
def test_adapters_see_their_own_thread_s_passes():
    """A drafter reads hidden states of a text that another thread writes."""
    target = tiny_target()
    mine, others = torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 7, 6], [5, 4, 3, 2]])

    def states_of(adapter: TargetAdapter, ids: Tensor) -> Tensor:
        target(ids)
        return adapter.pop_context_hidden_states()

    def run_another() -> Tensor:
        with TargetAdapter(target, [0]) as adapter:
            return states_of(adapter, others)

    with TargetAdapter(target, [0]) as adapter:
        expected = states_of(adapter, mine)
        target(mine)
        # a plain pass, and one that is tapped as well
        _elsewhere(lambda: target(others))
        theirs = _elsewhere(run_another)
        assert_same_up_to_rounding(adapter.pop_context_hidden_states(), expected)
        with TargetAdapter(target, [1, 0]) as inner:
            target(mine)
            seen = inner.pop_context_hidden_states()[..., target.config.hidden_size :]
            assert_same_up_to_rounding(seen, expected)
        assert_same_up_to_rounding(adapter.pop_context_hidden_states(), expected)
        # another thread may share its sums among more threads
        assert_same_up_to_rounding(states_of(adapter, others), theirs)


@pytest.mark.parametrize("has_own_drafter", [slow(True), False])
def test_texts_are_those_of_each_thread_alone(has_own_drafter, eager_switches):
    """Calls of `generate` in several threads fail, or write each other's text."""
    target = tiny_target()
    shared = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = [target.generate(**ragged_prompts(1 + number), **options) for number in range(NUM_THREADS)]

    def work(number: int) -> bool:
        drafter = shared
        if has_own_drafter:
            drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
        texts = []
        for one in ({}, {"assistant_model": drafter}, {"assistant_model": drafter, "scheduler": "fixed"}):
            texts += [target.generate(**ragged_prompts(1 + number), **options, **one) for _ in range(2)]
        return all(torch.equal(text, expected[number]) for text in texts)

    assert _together(work) == [True] * NUM_THREADS


def _outcome(num_rows: int, width: int) -> RoundOutcome:
    return RoundOutcome(
        Batch((7,) * num_rows, num_rows, 100), width - 1, [width - 1] * num_rows, [0] * num_rows, 1e-3, 1e-2
    )


def test_costs_are_learnt_from_several_threads(eager_switches):
    """A call fails because another one learns what its rounds cost meanwhile."""

    def learn(costs: OnlineCosts, draw: random.Random) -> None:
        rows = draw.choice((1, 2, 4))
        costs.observe(_outcome(rows, draw.randint(1, 8)))
        for width in range(1, 9):
            assert costs.verify_seconds(rows, width, 100) > 0
            assert costs.draft_seconds(rows, width, 100) > 0

    # a new object has most to learn
    for seed in range(12):
        costs = OnlineCosts()
        for rows in (1, 2, 4):
            for width in (1, 1, 2, 2):
                costs.observe(_outcome(rows, width))

        def work(number: int, costs: OnlineCosts = costs, seed: int = seed) -> None:
            draw = random.Random(NUM_THREADS * seed + number)
            for _ in range(20):
                learn(costs, draw)

        _together(work)


def test_a_drafter_is_judged_from_several_threads(eager_switches):
    """A call fails because another one learns meanwhile how the drafter fares."""
    memory = DrafterState()

    def work(number: int) -> None:
        draw = random.Random(number)
        for _ in range(300):
            margins = [[draw.uniform(0, 4) for _ in range(5)] for _ in range(4)]
            memory.recent_margins.add(margins)
            memory.estimator.learn(margins, [5] * 4, [draw.randint(0, 5) for _ in range(4)])
            assert memory.recent_margins.gains(5, memory.estimator).shape[1] == 5
            memory.parking(4).count_drafted(4, draw.uniform(-1, 1))
            memory.parking(4).count_trial(has_paid=True)

    _together(work)
