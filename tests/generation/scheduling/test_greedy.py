"""Every scheduler writes, token for token, what plain `generate` writes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dspark_hf import DSparkAssistantModel, install, uninstall
from dspark_hf.generation.scheduling import (
    AsynchronousScheduler,
    FixedScheduler,
    HardwareAwareScheduler,
    Scheduler,
    ThresholdScheduler,
)
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.generation.scheduling.fakes import ClockedAdaptive, ListedCosts, SwingingCosts
from tests.modeling.deepseek_v4.tiny import tiny_model
from tests.thinning import mostly_slow, slow
from tests.tiny import tiny_target

NEW_TOKENS = 14
NUM_ROWS = (1, 4)
ACCURACIES = {"right": 1.0, "wrong": 0.0, "often right": 0.7}
FAMILIES = ("llama", "gemma3_text", "deepseek_v4")
STAIRS = [1.0, 1.1, 1.5, 1.6, 2.0, 2.1]

SCHEDULERS: dict[str, Callable[[], Scheduler | str | None]] = {
    "default": lambda: None,
    "fixed": FixedScheduler,
    "threshold": ThresholdScheduler,
    "hardware aware": lambda: HardwareAwareScheduler(costs=ListedCosts(STAIRS)),
    "asynchronous": lambda: AsynchronousScheduler(costs=ListedCosts(STAIRS)),
    "adaptive": lambda: ClockedAdaptive(SwingingCosts(8)),
}
NAMES = ("fixed", "threshold", "hardware_aware", "asynchronous", "adaptive")


@pytest.fixture
def restored():
    yield
    install()


@cache
def _target(family: str) -> PreTrainedModel:
    return tiny_model() if family == "deepseek_v4" else tiny_target(family)


def _generate(target: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return target.generate(
        **inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    )


@cache
def _plain(family: str, num_rows: int) -> Tensor:
    return _generate(_target(family), ragged_prompts(num_rows))


def _scripted(family: str, num_rows: int, accuracy: float) -> ScriptedDrafter:
    inputs = ragged_prompts(num_rows)
    return ScriptedDrafter(_target(family), _plain(family, num_rows), num_padded(inputs), accuracy)


def _untrained(target: PreTrainedModel) -> DSparkAssistantModel:
    return DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=5)


# every scheduler once, those that plan with one row and with several; each family with one that plans
QUICK = {
    ("default", "llama", 1),
    ("fixed", "llama", 4),
    ("threshold", "llama", 1),
    ("hardware aware", "llama", 1),
    ("hardware aware", "gemma3_text", 4),
    ("asynchronous", "llama", 4),
    ("adaptive", "llama", 4),
    ("default", "gemma3_text", 1),
    ("adaptive", "deepseek_v4", 4),
}
CASES = [
    (pytest.param if (name, family, num_rows) in QUICK else slow)(name, family, num_rows)
    for name in SCHEDULERS
    for family in FAMILIES
    for num_rows in NUM_ROWS
]


@pytest.mark.parametrize(("name", "family", "num_rows"), CASES)
def test_output_is_token_identical(name, family, num_rows):
    """A scheduler changes the text of a family of targets."""
    plain = _plain(family, num_rows)
    kinds = tuple(ACCURACIES) if family == "llama" else ("often right",)
    for kind in kinds:
        drafter = _scripted(family, num_rows, ACCURACIES[kind])
        assisted = _generate(
            _target(family), ragged_prompts(num_rows), assistant_model=drafter, scheduler=SCHEDULERS[name]()
        )
        assert torch.equal(assisted, plain), kind
        assert drafter.last_statistics.num_committed == num_rows * (NEW_TOKENS - 1)
        if kind == "right":
            assert drafter.last_statistics.num_accepted == drafter.last_statistics.num_verified > 0


@pytest.mark.parametrize("num_rows", [1, slow(4)])
@pytest.mark.parametrize("name", mostly_slow(NAMES, ("hardware_aware", "adaptive")))
def test_schedulers_by_name(name, num_rows):
    """A name does not lead to a scheduler that runs, in the call or on the drafter, with or without the patch."""
    target, inputs, plain = _target("llama"), ragged_prompts(num_rows), _plain("llama", num_rows)
    drafter = _untrained(target)
    assert torch.equal(_generate(target, inputs, assistant_model=drafter, scheduler=name), plain)
    assert torch.equal(_generate(target, inputs, custom_generate=drafter.decode, scheduler=name), plain)
    drafter.scheduler = name
    assert torch.equal(_generate(target, inputs, assistant_model=drafter), plain)
    assert torch.equal(_generate(target, inputs, custom_generate=drafter.decode), plain)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_schedulers_without_the_patch(num_rows, restored):
    """A scheduler is lost, or refused, where Transformers is left as it is."""
    target, inputs, plain = _target("llama"), ragged_prompts(num_rows), _plain("llama", num_rows)
    drafter = _untrained(target)
    uninstall()
    assert torch.equal(_generate(target, inputs, custom_generate=drafter.decode, scheduler="fixed"), plain)
    # the default would make plain steps to learn what they cost
    *rounds, _ = drafter.last_statistics.rounds
    assert all(one.num_drafted for one in rounds)
    scheduler = ClockedAdaptive(SwingingCosts(8))
    assert torch.equal(_generate(target, inputs, custom_generate=drafter.decode, scheduler=scheduler), plain)
    assert not all(one.num_drafted for one in drafter.last_statistics.rounds)


@pytest.mark.parametrize(
    ("name", "family"),
    [(pytest.param if name in ("fixed", "hardware aware", "adaptive") else slow)(name, "llama") for name in SCHEDULERS]
    + [(pytest.param if name == "default" else slow)(name, "deepseek_v4") for name in SCHEDULERS],
)
def test_rows_that_leave(name, family):
    """Rows that end while others go on disturb the scheduler's count of rows, or the others' text."""
    free = _plain(family, 4)
    start = ragged_prompts(4)["input_ids"].shape[1]
    # tokens that end rows at different places
    ends = sorted({int(free[row, start + 3 + 4 * row]) for row in range(3)})
    plain = _generate(_target(family), ragged_prompts(4), eos_token_id=ends)
    assisted = _generate(
        _target(family),
        ragged_prompts(4),
        eos_token_id=ends,
        assistant_model=_scripted(family, 4, 0.7),
        scheduler=SCHEDULERS[name](),
    )
    assert torch.equal(assisted, plain)


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        (slow if (num_rows == 1) == (name in ("hardware aware", "asynchronous", "adaptive")) else pytest.param)(
            name, num_rows
        )
        for name in SCHEDULERS
        for num_rows in NUM_ROWS
    ],
)
def test_few_new_tokens(name, num_rows):
    """A scheduler asks for drafts that a row has no room for, or for a decision about none."""
    for new_tokens in (1, 2, 3, 6, 7):
        assisted = _generate(
            _target("llama"),
            ragged_prompts(num_rows),
            max_new_tokens=new_tokens,
            assistant_model=_scripted("llama", num_rows, 0.7),
            scheduler=SCHEDULERS[name](),
        )
        width = ragged_prompts(num_rows)["input_ids"].shape[1]
        assert torch.equal(assisted, _plain("llama", num_rows)[:, : width + new_tokens])


@pytest.mark.parametrize("name", mostly_slow(SCHEDULERS, ("default", "hardware aware")))
def test_several_returned_sequences(name):
    """A scheduler counts prompts instead of rows."""
    target = _target("llama")
    # one possible token: sampling that is greedy
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    assisted = _generate(
        target, ragged_prompts(2), assistant_model=_untrained(target), scheduler=SCHEDULERS[name](), **options
    )
    assert torch.equal(assisted, _plain("llama", 2).repeat_interleave(3, 0))


def test_adaptive_scheduler_parks_and_drafts_within_a_text():
    """The tests of this file see the adaptive scheduler in one mode only."""
    drafter = _scripted("llama", 4, 1.0)
    scheduler = ClockedAdaptive(SwingingCosts(8))
    _generate(_target("llama"), ragged_prompts(4), assistant_model=drafter, scheduler=scheduler)
    assert {one.num_drafted > 0 for one in drafter.last_statistics.rounds} == {False, True}
