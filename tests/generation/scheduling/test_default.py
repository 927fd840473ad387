"""The default scheduler in real runs: what it must do whatever the clock says."""

from __future__ import annotations

import pytest
import torch

from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.tiny import tiny_target

NEW_TOKENS = 200


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_drafter_that_is_always_wrong_is_parked(num_rows):
    """A user with a useless drafter pays for it in every round."""
    target = tiny_target()
    inputs = ragged_prompts(num_rows)
    plain = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.0)
    assisted = target.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=drafter, scheduler="adaptive"
    )
    assert torch.equal(assisted, plain)
    # some rounds to learn that, then ever fewer trials
    assert 0 < len(drafter.widths) < 0.2 * NEW_TOKENS
    before = len(drafter.widths)
    target.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=drafter, scheduler="adaptive"
    )
    # a second call remembers
    assert len(drafter.widths) - before < 0.06 * NEW_TOKENS
