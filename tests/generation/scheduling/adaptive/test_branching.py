"""When the default schedule drafts trees: where passes are measured to be nearly free, and trees promise more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dspark_hf.generation.scheduling import reset_learned_state
from dspark_hf.generation.scheduling.adaptive.branching import PathChances, RecentTrees
from dspark_hf.generation.scheduling.adaptive.scheduler import AdaptiveScheduler
from dspark_hf.generation.scheduling.defaults import FEW_TREES, MOST_OF_TREE, TREE_LEVELS
from tests.generation.drafters import ScriptedTreeDrafter
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target


@dataclass
class _Costs:
    """Every round takes longer than it can: what was measured counts as far as costs may be mistaken, always alike."""

    per_token: float

    def verify_seconds(self, num_rows: int, width: int, context_length: int) -> float:
        return 1e3 * (1 + self.per_token * (width - 1))

    def draft_seconds(self, num_rows: int, num_drafts: int, context_length: int) -> float:
        return 1e2


class _Drafter(ScriptedTreeDrafter):
    """Its chains are right as often as `chain_accuracy` says, its trees have the text among two children or more."""

    chain_accuracy = 0.0
    # how many chains at the start are wrong
    unlucky_chains = 0
    says_chances = True

    def start(self, target: Any, batch_size: int) -> Any:
        context: Any = super().start(target, batch_size)
        draft, draft_tree, accuracy = context.draft, context.draft_tree, self.accuracy

        def chain(*arguments: Any) -> Any:
            self.accuracy = 0.0 if self.unlucky_chains else self.chain_accuracy
            self.unlucky_chains = max(self.unlucky_chains - 1, 0)
            block = draft(*arguments)
            self.accuracy = accuracy
            return block

        def tree(*arguments: Any) -> Any:
            block = draft_tree(*arguments)
            # no path is more probable than the one before
            block.chances = torch.linspace(0.5, 0.01, block.num_drafts)[None] if self.says_chances else None
            return block

        context.draft, context.draft_tree = chain, tree
        return context


@pytest.fixture(autouse=True)
def _nothing_learned():
    reset_learned_state()
    yield
    reset_learned_state()


def _widths(
    per_token: float,
    chain_accuracy: float,
    accuracy: float,
    accept_rates: list[float] | None = None,
    says_chances: bool = True,
    unlucky_chains: int = 0,
    **how: Any,
) -> list[tuple[int, int]]:
    """Return of every round the drafts that were made and verified, of a text that is the target's own."""
    target, inputs = tiny_target(), ragged_prompts(1)
    options: dict[str, Any] = {**inputs, "max_new_tokens": 80, "do_sample": False}
    plain = target.generate(**options)
    drafter = _Drafter(target, plain, [0], accuracy)
    drafter.chain_accuracy, drafter.accept_rates = chain_accuracy, accept_rates
    drafter.says_chances, drafter.unlucky_chains = says_chances, unlucky_chains
    scheduler = AdaptiveScheduler(costs=_Costs(per_token))
    options |= {"scheduler": scheduler, **how}
    assert torch.equal(target.generate(**options, assistant_model=drafter), plain)
    return [(one.num_drafted, one.num_verified[0]) for one in drafter.last_statistics.rounds]


def test_trees_are_as_wide_as_pays():
    """Trees that give more than chains are not drafted, or all of them are verified in full, whatever that costs."""
    free, dear = (_widths(cost, chain_accuracy=0.0, accuracy=0.9) for cost in (0.001, 0.045))
    assert [made for made, _ in free[:FEW_TREES]] == [MOST_OF_TREE] * FEW_TREES
    verified = [verified for made, verified in free if made == MOST_OF_TREE][FEW_TREES:]
    assert len(verified) > len(free) / 2
    assert min(verified) == MOST_OF_TREE
    assert MOST_OF_TREE in [made for made, _ in dear]
    assert max(verified for _, verified in dear) < MOST_OF_TREE


@pytest.mark.parametrize("per_token", [0.02, 0.03, 0.045])
def test_trees_are_verified_to_few_widths(per_token):
    """Passes have as many widths as plans have ends, and none of them was timed often enough to be known."""
    rounds = _widths(per_token, chain_accuracy=0.0, accuracy=0.9)
    verified = {verified for made, verified in rounds[FEW_TREES:-FEW_TREES] if made == MOST_OF_TREE}
    assert verified and verified <= set(TREE_LEVELS)


def test_trees_are_tried_where_chains_do_not_pay():
    """A drafter whose chains were never accepted is parked before its trees have shown what they give."""
    rounds = _widths(0.001, chain_accuracy=0.0, accuracy=0.9, accept_rates=[1e-3] * 5)
    assert [made for made, _ in rounds[:FEW_TREES]] == [MOST_OF_TREE] * FEW_TREES
    assert sum(made == MOST_OF_TREE for made, _ in rounds) > len(rounds) / 2


def test_trees_of_a_drafter_that_says_no_chances():
    """Its trees are planned as if they had no drafts, which ends in an error of NumPy's."""
    free = _widths(0.001, chain_accuracy=0.0, accuracy=0.9, says_chances=False)
    assert sum(made == MOST_OF_TREE for made, _ in free) > len(free) / 2
    chains = _widths(0.045, chain_accuracy=1.0, accuracy=0.0, says_chances=False)
    assert all(made <= 5 for made, _ in chains[-8:])


def test_a_tree_without_drafts_has_no_gain():
    """A drafter that had nothing to say leaves a plan of no width."""
    trees = RecentTrees()
    trees.learn([], 0, [])
    assert trees.gains().tolist() == [[0.0]]


def test_chains_where_they_give_more():
    """Trees are drafted although chains give as much for less, or a few tries at the start go on for ever."""
    rounds = _widths(0.001, chain_accuracy=1.0, accuracy=0.2)
    assert rounds[0][0] == MOST_OF_TREE
    assert all(made <= 5 for made, _ in rounds[-8:])


def test_an_unlucky_chain_does_not_keep_trees_in_use():
    """Trees are tried some times, and then win for good over the one chain that there was, none of it accepted."""
    rounds = _widths(0.045, chain_accuracy=1.0, accuracy=0.5, unlucky_chains=1)
    assert rounds[-1][0] <= 5
    assert sum(made <= 5 for made, _ in rounds) > len(rounds) / 2


def test_trees_are_not_tried_where_width_is_dear():
    """Four trees at the start of every process, and one now and then, cost more than trees can bring there."""
    assert max(made for made, _ in _widths(0.15, chain_accuracy=0.5, accuracy=0.9)) <= 5


def test_who_may_expect_trees():
    """Trees are off unless asked for, or come although a call says that there are to be none, or few drafts."""
    cases: list[tuple[dict[str, Any], bool]] = [
        ({}, True),
        ({"draft_tree": "off"}, False),
        ({"num_assistant_tokens": 4}, False),
        ({"num_assistant_tokens": 4, "draft_tree": "auto"}, True),
    ]
    for options, are_there in cases:
        most = max(made for made, _ in _widths(0.001, chain_accuracy=0.3, accuracy=0.9, **options))
        assert (most == MOST_OF_TREE) if are_there else (most <= 5), options


def test_what_became_of_paths_counts():
    """A drafter that is too sure of its paths is believed for ever."""
    chances, trees = PathChances(), RecentTrees()
    for turn in range(60):
        # of paths it gives 0.6, every fifth is right; of those that it gives 0.05, as many as it says
        accepted = [place for place, every in ((0, 5), (1, 20)) if turn % every == 0]
        chances.learn([0.6, 0.05], accepted)
        trees.learn([0.6, 0.05], 2, accepted)
    sure, unsure = chances.of([0.6, 0.05])
    assert abs(sure - 0.2) < 0.06
    assert abs(unsure - 0.05) < 0.02
    assert trees.gains()[0].tolist() == [sure, unsure]
    # of what was not verified nothing is learned
    before = chances.of([0.6])
    trees.learn([0.6, 0.05], 0, [])
    assert trees.chances([0.6]) == before
