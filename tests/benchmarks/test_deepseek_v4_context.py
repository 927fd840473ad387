"""The benchmark of long contexts: what it fills, times and counts."""

from __future__ import annotations

import pytest
import torch

from benchmarks.deepseek_v4_context import (
    NUM_DRAFTS,
    Native,
    Ours,
    bytes_table,
    check_rounds,
    fill,
    measure,
    small_config,
    theory,
    time_table,
    wall_clock,
)
from dspark_hf.generation.statistics import SpeculationStatistics
from tests.thinning import slow


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _silent(message: str) -> None:
    pass


@pytest.mark.parametrize(
    "kind", [pytest.param(Ours, id="ours", marks=pytest.mark.slow), pytest.param(Native, id="native")]
)
def test_contexts_are_filled_and_timed(kind):
    """A cache does not hold the context it is listed under, or differs by how it was filled."""
    way = kind(small_config(16, max_rollback=8))
    places = list(fill(way, [256, 640, 1024], 640, 250, _silent))
    assert [(place.context, place.filled_by) for place in places] == [
        (256, "prompt"),
        (640, "prompt"),
        (640, "random entries"),
        (1024, "random entries"),
    ]
    assert all(way.length(place.cache) == place.context for place in places)
    prompt, random = places[1].kv_bytes, places[2].kv_bytes
    # room for entries to come depends on when there was none left
    assert prompt.entries == pytest.approx(random.entries, rel=0.01) and prompt.rest == random.rest
    measure(places, num_rounds=1, num_passes=1)
    for place in places:
        assert all(len(place.rounds[kind]) == 1 for kind in ("token", "verify"))
        # the native cache cannot be taken back
        assert way.length(place.cache) == place.context + (0 if kind is Ours else 2 * 9)
    assert len(time_table(places)) == 2 + 4
    assert len(bytes_table(places)) == 2 + 3
    assert "256 to 1,024" in wall_clock(places)


def test_rounds_that_are_timed_are_full_rounds():
    """What is timed as a round makes no drafts, since the scheduler gave the random drafter up."""
    way = Ours(small_config(16, max_rollback=8))
    place = next(fill(way, [256], 256, 256, _silent))
    num_rounds = way.rounds(place.cache, 16)
    statistics = way.drafter.last_statistics
    assert statistics.num_rounds == num_rounds > NUM_DRAFTS + 2
    # the last rounds may write 1 to 7 tokens, and one of them is the target's own
    assert statistics.num_drafted >= NUM_DRAFTS * (num_rounds - NUM_DRAFTS)
    assert way.length(place.cache) == 256
    for num_drafted, num_verified in ((0, 0), (NUM_DRAFTS * 12 - 29, NUM_DRAFTS * 12 - 29), (NUM_DRAFTS * 12, 12)):
        with pytest.raises(RuntimeError, match="`num_drafted` must be 7 a round, all of them verified"):
            check_rounds(SpeculationStatistics(num_rounds=12, num_drafted=num_drafted, num_verified=num_verified))


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [
        (torch.float32, {}),
        pytest.param(torch.float32, {"indexer_dtype": "fp4"}, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, {}, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, {"cache_dtype": "fp8"}, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, {"cache_dtype": "fp8", "indexer_dtype": "fp4"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kv_bytes_of_a_million_tokens(dtype, fields):
    """The cache takes more than the estimate says: room, copies or wider formats that nobody counted."""
    way = Ours(small_config(16, **fields), dtype)
    place = list(fill(way, [512, 1 << 20], 512, 512, _silent))[-1]
    expected = theory(way.config, place.context, dtype)
    assert place.kv_bytes.entries == pytest.approx(expected.entries, rel=1 / 128 + 1e-4)
    assert place.kv_bytes.total == pytest.approx(expected.total, rel=0.02)


@pytest.mark.parametrize("kind", [Ours, slow(Native)], ids=["ours", "native"])
def test_kv_bytes_of_entries(kind):
    """Entries are kept that no query will read again, or some are missing."""
    way = kind(small_config(16, max_rollback=0))
    place = next(fill(way, [1024], 1024, 512, _silent))
    expected = theory(way.config, 1024)
    if kind is Native:
        assert place.kv_bytes.entries == expected.entries
    else:
        # room for at most 16 more in each of three stores: CSA entries and their keys, HCA entries
        assert 0 <= place.kv_bytes.entries - expected.entries <= 16 * 4 * (32 + 8 + 32)
        # where nothing is taken back there is nothing but windows and pending tokens
        assert place.kv_bytes.rest == expected.rest
