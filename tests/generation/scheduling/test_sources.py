"""Who drafts: the choice that is worth most, by the costs and chances at hand."""

from __future__ import annotations

import random

from dspark_hf.generation.drafting.lookup import Offer
from dspark_hf.generation.scheduling.interface import Choice
from dspark_hf.generation.scheduling.sources import DrafterPlan, Rate, Trials, choose_sources


def _offer(*chances: float) -> Offer:
    return Offer(tuple(range(len(chances))), chances)


def _passes(price: float, most: int = 15) -> list[float]:
    return [1.0 + price * level for level in range(most + 1)]


def test_sure_offers_spare_the_drafter():
    """A round pays for the drafter although every row has better drafts already."""
    plan = DrafterPlan([0.6, 0.3], 0.5)
    choice = choose_sources([_offer(*[0.95] * 15)] * 2, plan, [True] * 2, _passes(0.05), 2.0)
    assert choice == Choice(0, (15, 15))


def test_offers_that_cost_more_than_they_yield_are_passed_over():
    """A wide pass is paid for drafts that are hardly ever accepted."""
    assert choose_sources([_offer(0.2, 0.2, 0.2)], None, [True], _passes(0.3), 1.0) is None
    # the drafter is better, so its plan stands
    assert choose_sources([_offer(0.2)], DrafterPlan([0.8, 0.7], 0.1), [True], _passes(0.1), 1.0) is None


def test_drafter_is_asked_where_a_long_offer_yields_more_only_on_paper():
    """A doubtful match spares the drafter, since drafts that are too dear to verify sum up to more than its one."""
    offer, plan = _offer(0.35, 0.6, *[0.8] * 13), DrafterPlan([0.6], 0.05)
    assert sum(offer.survival()) > sum(plan.gains)
    assert choose_sources([offer], plan, [True], _passes(0.2), 1.0) is None
    # beside a drafter that takes longer than it gains, it is taken
    choice = choose_sources([offer], DrafterPlan([0.6], 0.5), [True], _passes(0.2), 1.0)
    assert choice is not None and choice.num_drafts == 0


def test_each_row_asks_the_better_source():
    """One row's match decides for all rows of a batch."""
    offers = [_offer(*[0.9] * 7), Offer(), _offer(0.1, 0.1)]
    choice = choose_sources(offers, DrafterPlan([0.8, 0.7, 0.6], 0.2), [True] * 3, _passes(0.05), 3.0)
    assert choice is not None
    assert choice.num_drafts == 3
    assert choice.num_looked_up[0] >= 3 and choice.num_looked_up[1:] == (0, 0)


def test_rows_that_wait_ask_for_no_drafter():
    """The drafter runs for rows that are over."""
    choice = choose_sources(
        [_offer(*[0.9] * 5), Offer()], DrafterPlan([0.9] * 3, 0.1), [True, False], _passes(0.01), 1.0
    )
    assert choice == Choice(0, (5, 0))


def test_level_is_the_best_of_all():
    """Lookups stop at a step of the costs behind which they would pay again, or go on where they do not."""
    draw = random.Random(0)
    for _ in range(200):
        offers = [_offer(*(draw.random() for _ in range(7))) for _ in range(3)]
        passes = [1.0]
        for _ in range(7):
            passes.append(passes[-1] + draw.choice((0.0, 0.0, 0.5, 1.0)))
        rate = draw.uniform(0.5, 3.0)

        def worth(level: int, offers=offers, passes=passes, rate=rate) -> float:
            return sum(offer.expected(level) for offer in offers) - rate * (passes[level] - passes[0])

        best = max((0, 1, 2, 3, 5, 7), key=worth)
        choice = choose_sources(offers, None, [True] * 3, passes, rate)
        found = 0 if choice is None else choice.num_looked_up[0]
        assert abs(worth(found) - worth(best)) < 1e-9


def test_good_offers_are_tried_ever_more_rarely():
    """Costs that were guessed too high are never corrected, or trials cost as much as drafting."""
    trials = Trials()
    due = [index for index in range(200) if trials.is_due(2.0)]
    assert due == [3, 11, 27, 59, 123]
    assert not any(Trials().is_due(0.5) for _ in range(1000))


def test_rate_follows_the_latest_rounds():
    """What time is worth is fixed by the first rounds, or by what was expected, or by a single lucky one."""
    rate = Rate()
    assert all(rate.value(usual / 7, 0.3) == usual / 7 for usual in range(1, 50))
    rate.add(8.0, 0.5)
    assert 2.0 < rate.value(2.0, 0.5) < 4.0
    for _ in range(500):
        rate.add(1.0, 1.0)
    for _ in range(500):
        rate.add(3.0, 1.0)
    assert 2.9 < rate.value(2.0, 0.5) <= 3.0
