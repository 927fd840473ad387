"""The default scheduler in real runs: what it must do, by a clock that is told and by the machine's own."""

from __future__ import annotations

import pytest
import torch

from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.generation.scheduling.fakes import ClockedAdaptive, ListedCosts
from tests.thinning import slow
from tests.tiny import tiny_target

NEW_TOKENS = 200
# a busy machine makes single rounds of one token dear, and drafting then looks worth another trial
TOLD, OWN = {"first": 0.2, "second": 0.06}, {"first": 0.6, "second": 0.5}


def _told() -> ClockedAdaptive:
    return ClockedAdaptive(ListedCosts([1 + 0.1 * index for index in range(8)], [0.3] * 8))


def _own() -> str:
    return "adaptive"


@pytest.mark.parametrize(
    ("scheduler", "shares", "num_rows"),
    [(_told, TOLD, 1), slow(_told, TOLD, 3), slow(_own, OWN, 1), slow(_own, OWN, 3)],
)
def test_a_drafter_that_is_always_wrong_is_parked(scheduler, shares, num_rows):
    """A user with a useless drafter pays for it in every round."""
    target = tiny_target()
    inputs = ragged_prompts(num_rows)
    plain = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.0)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "assistant_model": drafter, "scheduler": scheduler()}
    assert torch.equal(target.generate(**inputs, **options), plain)
    # some rounds to learn that, then ever fewer trials
    assert 0 < len(drafter.widths) < shares["first"] * NEW_TOKENS
    before = len(drafter.widths)
    target.generate(**inputs, **options)
    # a second call remembers
    assert len(drafter.widths) - before < shares["second"] * NEW_TOKENS
