"""What a user reads after a call: how it went, and whether the drafter was used at all."""

from __future__ import annotations

import math

import pytest

from dspark_hf.generation.requests.request import Request
from dspark_hf.generation.requests.stream import generate_stream
from dspark_hf.generation.scheduling import AdaptiveScheduler
from dspark_hf.generation.scheduling.adaptive import scheduler as adaptive
from dspark_hf.generation.statistics import SpeculationStatistics
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.generation.scheduling.fakes import ListedCosts
from tests.tiny import tiny_target

NEW_TOKENS = 60
# passes of 1 to 8 tokens
CHEAP = ListedCosts([1.0] * 8)
DEAR = ListedCosts([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0])


def _statistics(scheduler, *, accuracy: float = 1.0, max_new_tokens: int = NEW_TOKENS) -> SpeculationStatistics:
    target, inputs = tiny_target(), ragged_prompts(1)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    drafter = ScriptedDrafter(target, target.generate(**inputs, **options), num_padded(inputs), accuracy)
    target.generate(**inputs, **options, assistant_model=drafter, scheduler=scheduler)
    return drafter.last_statistics


@pytest.fixture
def logged(monkeypatch) -> list[str]:
    """What the scheduler logs."""
    lines: list[str] = []
    monkeypatch.setattr(adaptive.logger, "info", lambda text, *values: lines.append(text % values))
    return lines


def test_parking_is_told(logged):
    """The default never drafts, and nobody can see why: no field, no line, no word in the summary."""
    statistics = _statistics(AdaptiveScheduler(costs=DEAR))
    assert statistics.num_parked == sum(not one.num_drafted for one in statistics.rounds) > 0
    assert statistics.parked_because.startswith("drafting promises 1.00 x")
    assert statistics.parked_because.endswith("costs 3.00 plain passes here")
    assert logged == [f"Drafting is parked: {statistics.parked_because}."]
    summary = str(statistics)
    assert "scheduler adaptive" in summary
    assert f"parked for {statistics.num_parked} passes" in summary
    assert statistics.parked_because in summary


def test_drafting_that_pays_is_not_parked(logged):
    """Plain steps that a drafting run is compared with count as parked."""
    statistics = _statistics(AdaptiveScheduler(costs=CHEAP))
    assert any(not one.num_drafted for one in statistics.rounds)
    assert (statistics.num_parked, statistics.parked_because) == (0, None)
    assert logged == []
    assert "parked" not in str(statistics)


def test_a_summary_tells_what_the_counts_say():
    """The first thing a user prints is a list of raw counters without tau."""
    statistics = _statistics("fixed", accuracy=0.7)
    lines = str(statistics).splitlines()
    assert f"tau {statistics.num_committed / statistics.num_rounds:.2f}: tokens per round" in lines[0]
    assert f"{statistics.num_accepted} of {statistics.num_verified} verified drafts accepted" in lines[0]
    seconds = statistics.draft_seconds + statistics.verify_seconds + statistics.other_seconds
    assert f"{statistics.num_committed / seconds:.1f} tokens/s" in lines[0]
    assert lines[1:] == ["scheduler fixed"]
    assert "origins" not in repr(statistics)


def test_nothing_is_no_number():
    """A call without a round reports a tau of 0, as of a drafter that is worse than none."""
    statistics = _statistics("fixed", max_new_tokens=1)
    assert math.isnan(statistics.tau) and math.isnan(statistics.mean_accepted)
    assert str(statistics).startswith("no rounds")
    # four drafts verified, none accepted: what would have become of the last three is not known
    statistics.add_round(num_drafted=4, num_verified=4, num_accepted=0, num_committed=1)
    assert statistics.accept_rate_by_position[0] == 0
    assert all(math.isnan(rate) for rate in statistics.accept_rate_by_position[1:])


def test_a_stream_tells_its_scheduler():
    """Whoever serves requests cannot see whether drafting pays there."""
    target = tiny_target()
    drafter = ScriptedDrafter(
        target, target.generate(**ragged_prompts(1), max_new_tokens=9, do_sample=False), [0], 1.0
    )
    requests = [Request([5, 6, 7], {"max_new_tokens": 20, "do_sample": False})]
    stream = generate_stream(target, requests, drafter=drafter, scheduler=AdaptiveScheduler(costs=DEAR))
    list(stream)
    assert stream.statistics.scheduler == "adaptive"
    assert stream.statistics.num_parked > 0


def test_positions_tell_of_the_drafter_alone():
    """Drafts that were looked up count as the drafter's: its acceptance by position is not its own."""
    statistics = SpeculationStatistics()
    statistics.add_round(2, 2, 1, 2)
    statistics.add_round(9, 9, 9, 10, "lookup")
    assert statistics.accept_rate_by_position == [1.0, 0.0]
    assert statistics.num_accepted == 10
