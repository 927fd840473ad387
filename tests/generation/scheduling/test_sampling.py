"""Sampled text follows the target under every scheduler: against a chain of known law, and against enumerated texts.

R rows, T tokens, V vocab.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper

from dspark_hf.generation.drafting.interface import DraftedBlock, Drafter
from dspark_hf.generation.scheduling import (
    AsynchronousScheduler,
    Batch,
    CallInfo,
    FixedScheduler,
    HardwareAwareScheduler,
    Schedule,
    Scheduler,
    ThresholdScheduler,
)
from dspark_hf.generation.statistics import SpeculationStatistics
from tests.generation.drafters import MemorylessDrafter
from tests.generation.frequencies import PROMPT, PrefixDependent, small_target, smallest_p_value, untrained_drafter
from tests.generation.scheduling.chains import chain_target, first_places
from tests.generation.scheduling.fakes import ClockedAdaptive, ListedCosts, SwingingCosts
from tests.reference.sampling import SMALLEST_P_VALUE, p_value, text_probabilities
from tests.thinning import mostly_slow, slow

# behind token 0 the drafter is good, behind token 1 it knows nothing; its margins and its confidence tell
TRANSITIONS = torch.tensor([[0.5, 0.5], [0.85, 0.15]])
DRAFT_TRANSITIONS = torch.tensor([[0.6, 0.4], [0.5, 0.5]])
CONFIDENCE = 1 - (TRANSITIONS - DRAFT_TRANSITIONS).abs().sum(-1) / 2
BLOCK_SIZE = 3
# makes the raw logits and their margins larger than those that are sampled from, large enough to trust untaught
TEMPERATURE = 20.0
CHAIN_TOKENS = 600
CHAIN_PROMPTS = {
    "input_ids": torch.tensor([[1, 0, 1], [0, 0, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]]),
}
# the third draft comes nearly free behind the second
STAIRS = [1.0, 1.35, 1.9, 1.95]
STEEP = [1.0, 1.5, 2.1, 2.8]

SCHEDULERS: dict[str, Callable[[], Scheduler | str | None]] = {
    "fixed": FixedScheduler,
    "threshold": lambda: ThresholdScheduler(0.8),
    "threshold, online": lambda: ThresholdScheduler(0.8, confidence="online"),
    "hardware aware": lambda: HardwareAwareScheduler(costs=ListedCosts(STAIRS)),
    "hardware aware, online": lambda: HardwareAwareScheduler(costs=ListedCosts(STAIRS), confidence="online"),
    "asynchronous": lambda: AsynchronousScheduler(costs=ListedCosts(STEEP)),
    "asynchronous, online": lambda: AsynchronousScheduler(costs=ListedCosts(STEEP), confidence="online"),
    "adaptive": lambda: ClockedAdaptive(ListedCosts(STAIRS)),
    "adaptive, parking": lambda: ClockedAdaptive(SwingingCosts(50)),
    "default": lambda: None,
}


# confidence learnt online takes the same way to a decision; "default" is "adaptive" with costs of its own; the others'
# batches are sampled below
QUICK = ("adaptive, parking",)


def _write_chains(
    scheduler: Scheduler | str | None, num_tokens: int = CHAIN_TOKENS
) -> tuple[Tensor, SpeculationStatistics]:
    """Return the text of two rows, from each one's last prompt token on, and what was decided."""
    drafter = MemorylessDrafter(
        lambda slot, previous: TEMPERATURE * DRAFT_TRANSITIONS[previous].log(),
        2,
        BLOCK_SIZE,
        confidence_after=lambda slot, previous: CONFIDENCE[previous],
    )
    output = chain_target(TRANSITIONS**TEMPERATURE).generate(
        **CHAIN_PROMPTS,
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=TEMPERATURE,
        assistant_model=drafter,
        scheduler=scheduler,
    )
    assert drafter.last_statistics is not None
    return output[:, 2:], drafter.last_statistics


def _smallest_chain_p_value(texts: Tensor, statistics: SpeculationStatistics) -> float:
    """Return the smallest p-value of two rows' transitions, over texts and at the start of rounds.

    Given a round's anchors its first tokens are independent, of each other and of all that was before.
    """
    p_values = []
    places = torch.tensor([first_places([one.num_accepted[row] for one in statistics.rounds]) for row in range(2)])
    # rounds in which both rows write; the anchor stands before the round's first token
    places = places[:, (places < texts.shape[1] - 1).all(0)]
    anchors, firsts = texts.gather(1, places), texts.gather(1, places + 1)
    for row, last in itertools.product(range(2), range(2)):
        following = texts[row, 1:][texts[row, :-1] == last]
        p_values.append(p_value(following[:, None], TRANSITIONS[last]))
        p_values.append(p_value(firsts[row][anchors[row] == last, None], TRANSITIONS[last]))
    # surprise of mean 0 and variance 1; the products of both rows' have them too
    expected = TRANSITIONS[anchors, 0].double()
    surprise = ((firsts == 0).double() - expected) / (expected * (1 - expected)).sqrt()
    num_deviations = surprise.prod(0).mean() * math.sqrt(surprise.shape[1])
    return min(*p_values, math.erfc(abs(num_deviations) / math.sqrt(2)))


@pytest.mark.parametrize("name", mostly_slow(SCHEDULERS, QUICK))
def test_two_rows_are_independent_chains(name):
    """Text does not follow the target, or rows that are scheduled together depend on each other."""
    texts, statistics = _write_chains(SCHEDULERS[name]())
    assert _smallest_chain_p_value(texts, statistics) > SMALLEST_P_VALUE
    # drafts were rejected, and there were decisions that could have been wrong
    assert 0 < statistics.num_accepted < statistics.num_verified
    decisions = {one.num_verified for one in statistics.rounds[:-3]}
    assert len(decisions) > 1 or name == "fixed"
    if name == "adaptive, parking":
        share = sum(one.num_drafted > 0 for one in statistics.rounds) / len(statistics.rounds)
        assert 0.1 < share < 0.9


class _SelfishScheduler(Scheduler, Schedule):
    """Verify a row's first draft if the second is worth more: in single rows the paper's counterexample."""

    name = "selfish"

    def start(self, call: CallInfo) -> Schedule:
        return self

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        assert drafted.confidence is not None
        is_good = drafted.confidence[:, min(1, drafted.confidence.shape[1] - 1)] > 0.8
        return [limit * good for limit, good in zip(batch.limits, is_good.tolist(), strict=True)]


class _ConformistScheduler(Scheduler, Schedule):
    """Verify both rows if their first drafts are alike: their texts grow alike."""

    name = "conformist"

    def start(self, call: CallInfo) -> Schedule:
        return self

    def admit(self, drafted: DraftedBlock, batch: Batch) -> list[int]:
        are_alike = len(set(drafted.token_ids[:, 0].tolist())) == 1
        return [limit * are_alike for limit in batch.limits]


@pytest.mark.parametrize(
    ("scheduler", "num_tokens"),
    [
        (_SelfishScheduler(), CHAIN_TOKENS),
        slow(_ConformistScheduler(), 4 * CHAIN_TOKENS),
    ],
    ids=["selfish", "conformist"],
)
def test_schedulers_that_look_ahead_are_found_out(scheduler, num_tokens):
    """The test above passes for text that does not follow the target."""
    assert _smallest_chain_p_value(*_write_chains(scheduler, num_tokens)) < SMALLEST_P_VALUE


OPTIONS: dict[str, Any] = {
    "temperature": 0.8,
    "logits_processor": LogitsProcessorList([PrefixDependent()]),
    "eos_token_id": 3,
}
ENUMERATED_TOKENS = 5


def _sample(target: PreTrainedModel, drafter: Drafter, prompts: Tensor, mask: Tensor) -> Tensor:
    samples = target.generate(
        prompts,
        attention_mask=mask,
        max_new_tokens=ENUMERATED_TOKENS,
        do_sample=True,
        assistant_model=drafter,
        **OPTIONS,
    )[:, prompts.shape[1] :]
    # a batch is as long as its longest row
    return torch.nn.functional.pad(samples, (0, ENUMERATED_TOKENS - samples.shape[1]))


def _p_value_of(samples: Tensor, target: PreTrainedModel, prompt: Tensor, mask: Tensor) -> float:
    processors = LogitsProcessorList([PrefixDependent(), TemperatureLogitsWarper(OPTIONS["temperature"])])
    probabilities = text_probabilities(target, prompt, ENUMERATED_TOKENS, processors=processors, attention_mask=mask)
    return smallest_p_value(samples, probabilities)


def _target() -> PreTrainedModel:
    target = small_target()
    target.generation_config.eos_token_id = OPTIONS["eos_token_id"]
    return target


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ("threshold", "hardware aware", "asynchronous", "adaptive, parking", "default"), ("asynchronous", "default")
    ),
)
def test_batches_keep_their_distributions(name):
    """Sampled text of ragged rows, some of which end early, is not the target's under some scheduler."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    prompts = torch.tensor([[2, 3, 4, 5, 1], [0, 0, 4, 2, 2], [0, 0, 0, 0, 5]])
    target = _target()
    drafter = untrained_drafter(target)
    drafter.scheduler = SCHEDULERS[name]()
    samples = _sample(target, drafter, prompts.repeat(700, 1), mask.repeat(700, 1))
    for row in range(3):
        assert _p_value_of(samples[row::3], target, prompts[row], mask[row]) > SMALLEST_P_VALUE


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_small_batches_keep_the_distribution(name, num_rows):
    """Sampled text is not the target's where every row's drafts count in the decision."""
    target = _target()
    prompts = PROMPT.expand(num_rows, -1)
    mask = torch.ones_like(prompts)
    drafter = untrained_drafter(target)
    drafter.scheduler = SCHEDULERS[name]()
    samples = torch.cat([_sample(target, drafter, prompts, mask) for _ in range(900 // num_rows)])
    assert _p_value_of(samples, target, PROMPT, mask[0]) > SMALLEST_P_VALUE
