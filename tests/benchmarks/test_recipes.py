"""The comparison of recipes: what is counted behind answers, and what its table says of it."""

from pathlib import Path

import pytest
import torch

from benchmarks.recipes import RECIPES, Bench, Result, make_table, spread, tokens_a_block
from dspark_hf import DSparkAssistantModel
from tests.tiny import tiny_target


def test_every_recipe_changes_one_choice():
    """A recipe is compared with the base although it differs in several things, or in none."""
    base, *others = RECIPES
    for one in others:
        pairs = [(one.drafter[key], base.drafter[key]) for key in base.drafter]
        pairs += [(one.training[key], base.training[key]) for key in base.training]
        num_changed = sum(own != its for own, its in pairs) + (one.num_conversations is not None)
        # weights of the two losses, and a rate that belongs to an optimizer
        assert num_changed == (2 if {"AdamW", "cross-entropy"} & set(one.name.split()) else 1), one.name
    assert len({one.name for one in RECIPES}) == len(RECIPES)


def test_tokens_behind_answers_are_those_of_greedy_blocks():
    """Blocks are counted beyond the answer's end, or the bonus token is left out."""
    target = tiny_target("llama")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4, block_size=3).eval()
    text = target.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    # nothing is right of a drafter that was never trained but by chance
    assert 1 <= tokens_a_block(target, drafter, [([5, 6, 7], text)]) < 2
    # an answer that says what the drafter does
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.zero_()
    assert tokens_a_block(target, drafter, [([5, 6, 7], [0] * 12)]) == 4


@pytest.mark.parametrize(
    ("num_conversations", "seconds", "steps"),
    # 50 steps with the target's pass and 150 without it; fewer than these 50; all of them with it
    [(200, 500, 200), (200, 100, 20), (None, 500, 100)],
)
def test_text_that_is_read_again_costs_less(
    monkeypatch: pytest.MonkeyPatch, num_conversations: int | None, seconds: float, steps: int
) -> None:
    """Old text is compared with new text as if the target had to read it each time."""
    recipe = next(one for one in RECIPES if one.num_conversations == num_conversations)
    took = iter([5.0, 5 / 3])
    monkeypatch.setattr(Bench, "_seconds_a_step", lambda *_: next(took))
    assert Bench(None, None, [], [], [], Path())._steps_within(recipe, seconds, "") == steps


def test_few_conversations_are_of_all_kinds() -> None:
    """A recipe of few conversations learns one file's kind, and is compared with those of all."""
    assert spread(list("aaaabbbbcc"), 5) == list("aabbc")
    assert spread([1, 2, 3], 3) == [1, 2, 3]


def test_the_table_compares_with_the_first():
    """Gains are those over another recipe than the base."""
    results = {"base": Result(90, 1.3, 1.5, 9_000_000), "other": Result(60, 1.4, 1.65, 12_500_000)}
    *_, base, other = make_table(results)
    assert base == "| base | 9.0 M | 90 | 1.30 | 1.500 |  |"
    assert other == "| other | 12.5 M | 60 | 1.40 | 1.650 | +10.0% |"
