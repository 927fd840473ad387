"""Beliefs against outcomes."""

from __future__ import annotations

import pytest

from dspark_hf.evaluation.records import RoundRecord
from dspark_hf.evaluation.reliability import measure_reliability
from tests.evaluation.examples import BLOCK_SIZE, random_rounds


def test_pairs_agree_with_a_walk_over_every_draft():
    """Survival is compared with the outcome of single drafts, or a confidence with drafts whose prefix fell."""
    prompts = [random_rounds(seed) for seed in range(5)]
    survivals, conditionals = [], []
    by_position = [[] for _ in range(BLOCK_SIZE)]
    for one in (one for rounds in prompts for one in rounds):
        survival, stands = 1.0, True
        for position, confidence in enumerate(one.confidence or ()):
            survival *= confidence
            taken = stands and position < one.num_accepted
            survivals.append((survival, taken))
            by_position[position].append((survival, taken))
            if stands:
                conditionals.append((confidence, taken))
            stands = taken
    reliability = measure_reliability(prompts)
    for trust, pairs in ((reliability.survival, survivals), (reliability.conditional, conditionals)):
        assert trust.num_drafts == len(pairs) == sum(one.num_drafts for one in trust.bins)
        assert trust.brier == pytest.approx(sum((belief - taken) ** 2 for belief, taken in pairs) / len(pairs))
        better = [(high > low) + 0.5 * (high == low) for high, yes in pairs if yes for low, no in pairs if not no]
        assert trust.auc == pytest.approx(sum(better) / len(better))
        gaps = sum(one.num_drafts * abs(one.believed - one.observed) for one in trust.bins)
        assert trust.ece == pytest.approx(gaps / len(pairs))
    assert reliability.num_by_position == tuple(len(pairs) for pairs in by_position)
    believed = [sum(belief for belief, _ in pairs) / len(pairs) for pairs in by_position]
    observed = [sum(taken for _, taken in pairs) / len(pairs) for pairs in by_position]
    assert reliability.believed_by_position == pytest.approx(believed)
    assert reliability.observed_by_position == pytest.approx(observed)


def test_ranking_is_unknown_where_all_came_out_alike():
    """NaN reaches the file, where JSON has no word for it."""
    reliability = measure_reliability([[RoundRecord(2, 2, 0, 1, (0.5, 0.5))]])
    assert reliability.conditional.auc is None


def test_no_confidence_no_reliability():
    """A drafter without a confidence head gets a calibration error of zero."""
    assert measure_reliability([[RoundRecord(2, 2, 1, 2)], []]) is None
