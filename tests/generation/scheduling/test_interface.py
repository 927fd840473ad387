"""What a scheduler of one's own is built on."""

from __future__ import annotations

import doctest

import pytest

from dspark_hf.generation import scheduling
from dspark_hf.generation.scheduling import estimator, interface


@pytest.mark.parametrize("module", [interface, estimator])
def test_docstring_examples(module):
    """An example in the documentation does not run."""
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (scheduling, "Call", "CallInfo"),
        (scheduling, "Outcome", "RoundOutcome"),
        (scheduling, "forget", "reset_learned_state"),
        (interface, "Call", "CallInfo"),
        (interface, "Outcome", "RoundOutcome"),
    ],
)
def test_old_names_lead_to_the_new_ones(module, old, new):
    """A scheduler that a user wrote earlier no longer imports, or its author never hears of the new name."""
    with pytest.warns(DeprecationWarning, match=f"`{old}` is called `{new}` now"):
        assert getattr(module, old) is getattr(module, new)


def test_other_names_are_unknown():
    """A misspelt name is given without an error."""
    for module in (scheduling, interface):
        with pytest.raises(AttributeError, match="Calls"):
            module.Calls  # noqa: B018
