"""Rounds of one answer, taken from the run's own statistics."""

from __future__ import annotations

import pytest
import torch

from dspark_hf.evaluation.acceptance import summarize_acceptance
from dspark_hf.evaluation.records import round_records
from tests.evaluation.examples import tiny_models
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import ragged_prompts
from tests.thinning import slow
from tests.tiny import tiny_target

PROMPT = torch.tensor([[5, 9, 23, 8]])


@pytest.mark.parametrize(
    ("accuracy", "length"),
    [(1.0, 2), (0.0, 3), (0.7, 17), (1.0, 40)]
    + [slow(1.0, 3), slow(1.0, 17), slow(0.7, 2), slow(0.7, 3), slow(0.7, 40)]
    + [slow(0.0, 2), slow(0.0, 17), slow(0.0, 40)],
)
def test_rounds_add_up_to_the_statistics(accuracy, length):
    """Counts of an evaluation differ from those of the run, above all where a length limit cuts the last round."""
    target = tiny_target()
    script = target.generate(PROMPT, max_new_tokens=64, do_sample=False)
    drafter = ScriptedDrafter(target, script, [0], accuracy)
    target.generate(PROMPT, max_new_tokens=length, do_sample=False, assistant_model=drafter)
    statistics = drafter.last_statistics
    rounds = round_records(statistics)
    assert len(rounds) == statistics.num_rounds
    assert sum(one.num_committed for one in rounds) == statistics.num_committed == length - 1
    assert sum(one.num_drafted for one in rounds) == statistics.num_drafted
    assert sum(one.num_verified for one in rounds) == statistics.num_verified
    acceptance = summarize_acceptance([rounds])
    assert acceptance.tau.value == pytest.approx(statistics.tau)
    reached = [count for count in statistics.verified_by_position if count]
    assert list(acceptance.verified_by_position) == reached
    rates = [rate.value for rate in acceptance.rate_by_position]
    assert rates == pytest.approx(statistics.accept_rate_by_position[: len(reached)])


def test_end_token_inside_a_block_is_counted_once():
    """Tokens behind an end that lies inside an accepted block count as committed."""
    target = tiny_target()
    script = target.generate(PROMPT, max_new_tokens=64, do_sample=False)
    end = int(script[0, PROMPT.shape[1] + 3])
    drafter = ScriptedDrafter(target, script, [0], 1.0)
    output = target.generate(
        PROMPT, max_new_tokens=64, do_sample=False, assistant_model=drafter, eos_token_id=end, pad_token_id=0
    )
    rounds = round_records(drafter.last_statistics)
    assert sum(one.num_committed for one in rounds) == output.shape[1] - PROMPT.shape[1] - 1
    assert rounds[-1].num_committed < rounds[-1].num_accepted + 1


def test_more_rows_are_refused():
    """Rounds of rows that only wait for others are counted as theirs."""
    models = tiny_models()
    drafter = models.drafters["dspark"]
    models.target.generate(**ragged_prompts(2), max_new_tokens=8, do_sample=False, assistant_model=drafter)
    with pytest.raises(ValueError, match="`statistics` must be of a call with one row, got 2 rows"):
        round_records(drafter.last_statistics)
