"""Accepted length, verify rate and acceptance by position."""

from __future__ import annotations

import pytest

from dspark_hf.evaluation.acceptance import summarize_acceptance
from dspark_hf.evaluation.records import RoundRecord
from tests.evaluation.examples import BLOCK_SIZE, random_rounds


def test_counts_agree_with_a_walk_over_every_draft():
    """A rate is taken over drafts whose prefix was rejected, or over drafts that were not verified."""
    prompts = [random_rounds(seed) for seed in range(6)]
    acceptance = summarize_acceptance(prompts)
    reached, accepted, tokens, passes = [0] * BLOCK_SIZE, [0] * BLOCK_SIZE, 0, 0
    for one in (one for rounds in prompts for one in rounds):
        passes += 1
        tokens += one.num_committed
        for position in range(one.num_verified):
            reached[position] += 1
            if position >= one.num_accepted:
                break
            accepted[position] += 1
    assert acceptance.tau.value == pytest.approx(tokens / passes)
    assert acceptance.num_rounds == passes
    assert list(acceptance.verified_by_position) == reached
    rates = [rate.value for rate in acceptance.rate_by_position]
    assert rates == pytest.approx([a / r for a, r in zip(accepted, reached, strict=True)])
    assert acceptance.verify_rate.value == pytest.approx(sum(accepted) / acceptance.num_verified)


def test_positions_never_reached_are_left_out():
    """A position no round came to is drawn as one that was always rejected."""
    rounds = [RoundRecord(num_drafted=4, num_verified=4, num_accepted=1, num_committed=2)]
    acceptance = summarize_acceptance([rounds, rounds])
    assert [rate.value for rate in acceptance.rate_by_position] == [1.0, 0.0]
    assert acceptance.verified_by_position == (2, 2)


def test_nothing_to_measure():
    """A set whose answers all end with their first token crashes the report, or has a tau of zero."""
    acceptance = summarize_acceptance([[], []])
    assert (acceptance.tau, acceptance.verify_rate, acceptance.rate_by_position) == (None, None, ())
