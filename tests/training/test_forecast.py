"""A run tells what to expect of it, and how much of that fits into its time."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.training import forecast as module
from dspark_hf.training.conversations import Conversation
from dspark_hf.training.expectation import Curve
from dspark_hf.training.forecast import Forecast, measure_break_even
from tests.tiny import tiny_target

TEXTS = [
    Conversation(torch.arange(300) % 60, torch.arange(300) >= 100),
    Conversation(torch.arange(20), torch.arange(20) > 9),
]
ARGS = SimpleNamespace(
    num_anchors=128, train_batch_size=2, gradient_accumulation_steps=3, world_size=2, confidence_only=False
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test moves."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "monotonic", lambda: found.now)
    return found


def _run(clock: SimpleNamespace, seconds: float, **options: Any) -> tuple[Forecast, list[str]]:
    target = tiny_target()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    said: list[str] = []
    told = Forecast(drafter, TargetAdapter(target, drafter.target_layer_ids), TEXTS, said.append, **options)
    state = SimpleNamespace(global_step=0, max_steps=1000, is_world_process_zero=True, log_history=[])
    told.on_train_begin(ARGS, state, None)
    for step in range(25):
        told.on_step_begin(ARGS, state, None)
        # the first ones are slow
        clock.now += 10 * seconds if step < 4 else seconds
        state.global_step += 1
        told.on_step_end(ARGS, state, None)
    return told, said


def test_the_time_decides_how_many_steps_there_are(clock: SimpleNamespace) -> None:
    """An hour is promised what a day brings, or slow first steps are taken for all."""
    told, said = _run(clock, 2.0, max_minutes=10)
    # 199 and 9 positions to start from, of which 128 at most; 12 sequences a step
    blocks = 12 * (128 + 9) / 2
    assert f"after 1,000 steps ({1000 * blocks:,.0f} blocks of 210 tokens of text)" in said[0]
    assert "How many steps fit into 10 minutes is known after 20." in said
    # 4 slow steps and 16 others have taken 112 seconds of the 600: 244 more
    assert said[-1].startswith("2 s a step, 8.13 minutes to go: expected held-out tau")
    assert "after 264 steps" in said[-1]
    assert told.tau == Curve().tau(264 * blocks, num_tokens=210, layers=1)


def test_a_drafter_to_go_on_from_counts(clock: SimpleNamespace) -> None:
    """A good drafter that is adapted would be said to begin at nothing."""
    told, said = _run(clock, 2.0, start=1.5)
    assert told.tau is not None
    assert told.tau > max(1.5, Curve().tau(1000 * 12 * (128 + 9) / 2, num_tokens=210, layers=1))
    assert "after 1,000 steps" in said[-1]


def test_evaluations_are_believed_more_than_other_runs(clock: SimpleNamespace) -> None:
    """An easy text is promised little to the end, however well it goes."""
    told, said = _run(clock, 2.0, max_minutes=10)
    first, num_said, per_step = told.tau, len(said), 12 * (128 + 9) / 2
    history = [{"step": 0, "eval_expected_tau": 1.5}, {"step": 25, "loss": 3.0}]
    state = SimpleNamespace(global_step=50, max_steps=1000, is_world_process_zero=True, log_history=history)
    history.append({"step": 50, "eval_expected_tau": 2.0})
    told.on_evaluate(ARGS, state, None)
    # one is not enough
    assert len(said) == num_said
    history.append({"step": 100, "eval_expected_tau": 2.2})
    state.global_step = 100
    told.on_evaluate(ARGS, state, None)
    seen = [(50 * per_step, 2.0), (100 * per_step, 2.2)]
    expected = Curve().tau_seen(seen, 264 * per_step, num_tokens=210)
    assert said[-1].startswith(f"By its evaluations so far: held-out tau {expected:.2f}, about ")
    assert said[-1].endswith(" times plain speed after 264 steps.")
    # what was said at the beginning is what the end is compared with
    assert told.tau == first
    state.global_step = 264
    told.on_evaluate(ARGS, state, None)
    assert len(said) == num_said + 1


def test_speed_comes_from_this_machine() -> None:
    """A speed-up is promised from nothing."""
    target = tiny_target()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    adapter = TargetAdapter(target, drafter.target_layer_ids)
    found = measure_break_even(drafter, adapter)
    # drafting and a wider pass cost more than nothing; a block of 7 may pay or not
    assert found is not None
    assert found > 0
    # its hooks are gone
    assert not any(layer._forward_hooks for layer in adapter.layers)
    assert re.fullmatch(r"\d+\.\d+", f"{found:.2f}")
