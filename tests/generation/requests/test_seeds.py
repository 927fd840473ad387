"""Requests with seeds of their own, among others."""

from __future__ import annotations

from typing import Any

import pytest

from dspark_hf import FinishedRequest, LookupAssistant, Request, generate_stream
from tests.tiny import tiny_target

SAMPLED = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}


def _write(*options: dict[str, Any], drafter: Any = None) -> list[FinishedRequest]:
    requests = [Request([5, 6, 7], {**SAMPLED, **one}, key) for key, one in enumerate(options)]
    finished = generate_stream(tiny_target(), requests, drafter=drafter, max_rows=3)
    return sorted(finished, key=lambda one: one.request.key)


def _ids(finished: FinishedRequest) -> list[int]:
    assert finished.error is None and finished.token_ids is not None
    return finished.token_ids.tolist()


def test_a_request_has_a_seed_of_its_own():
    """A seed gives another text where other requests share the batch, or join before it."""
    seeded = {"sampling": "invariant", "seed": 4}
    (alone,) = _write(seeded)
    others = _write({}, seeded, {"sampling": "invariant"}, {**seeded, "seed": 5}, seeded, drafter=LookupAssistant())
    assert _ids(others[1]) == _ids(others[4]) == _ids(alone)
    assert len({str(_ids(one)) for one in others}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, "`seed` of a request must come with `sampling='invariant'`, got 4 alone."),
        (
            {"seed": -1, "sampling": "invariant"},
            r"`seed` of a request must be a whole number in \[0, 2\*\*64\), got -1",
        ),
        ({"seed": True, "sampling": "invariant"}, "`seed` of a request must be a whole number"),
    ],
)
def test_seeds_that_decide_nothing_are_refused(options, message):
    """A seed is ignored without a word."""
    (finished,) = _write(options)
    with pytest.raises(ValueError, match=message):
        raise finished.error or AssertionError("it was served")
