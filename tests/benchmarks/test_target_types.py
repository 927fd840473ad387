"""Types that only the walk over all of Transformers' tries, against plain `generate`."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from benchmarks.target_types import try_type


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["inkling_text", "inkling2_loop_text"])
def test_convolutions_beside_a_window(model_type: str) -> None:
    """A window forgets with its convolutions, or layers that a model adds in its first pass are not taken back."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this Transformers does not know the type")
    outcome = try_type(model_type)
    # random weights in dozens of layers: plain's own text may depend on the width of a pass
    assert outcome.one_row in ("identical", "tie", "plain varies")
    assert outcome.three_rows == "refused"
