"""Ratios over prompts and their bootstrap intervals."""

from __future__ import annotations

import random

import pytest
import torch

from dspark_hf.evaluation.intervals import ratio_of_sums


def test_value_weighs_prompts_by_their_rounds():
    """A prompt with few rounds counts as much as one with many: tau is no longer tokens per round."""
    assert ratio_of_sums([10.0, 2.0], [5.0, 2.0]).value == pytest.approx(12 / 7)


def test_interval_agrees_with_a_slow_bootstrap():
    """The interval is of single rounds, or of means of prompts, instead of resampled prompts."""
    generator = random.Random(0)
    denominators = [generator.randint(5, 60) for _ in range(25)]
    numerators = [round(one * generator.uniform(1.5, 3)) for one in denominators]
    ratios = []
    for _ in range(4000):
        drawn = [generator.randrange(25) for _ in range(25)]
        ratios.append(sum(numerators[i] for i in drawn) / sum(denominators[i] for i in drawn))
    ratios.sort()
    estimate = ratio_of_sums(numerators, denominators)
    # the spread of a bootstrap quantile over 2000 resamples is about 0.01 here
    assert estimate.low == pytest.approx(ratios[100], abs=0.04)
    assert estimate.high == pytest.approx(ratios[-101], abs=0.04)
    assert estimate.low < estimate.value < estimate.high


def test_interval_is_the_same_every_time_and_leaves_the_generator_alone():
    """Two reports of one run differ, or measuring changes what is sampled next."""
    state = torch.get_rng_state()
    first = ratio_of_sums([3.0, 9.0, 4.0], [2.0, 3.0, 3.0])
    assert first == ratio_of_sums([3.0, 9.0, 4.0], [2.0, 3.0, 3.0])
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_known_is_none():
    """Nothing observed is reported as a rate of zero, or one prompt as certainty."""
    assert ratio_of_sums([0.0, 0.0], [0.0, 0.0]) is None
    assert ratio_of_sums([], []) is None
    single = ratio_of_sums([3.0], [2.0])
    assert (single.value, single.low, single.high) == (1.5, None, None)


def test_resamples_without_observations_are_left_out():
    """One prompt with observations among many without makes the interval NaN."""
    estimate = ratio_of_sums([1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0])
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)
