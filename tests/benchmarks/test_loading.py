"""What several benchmarks load, by the names that their users give."""

from __future__ import annotations

import pytest
import typer

from benchmarks.loading import load_packaged, time_word


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("smollm3", "fp32", "`--model` must be one of smollm2, gemma, got 'smollm3'"),
        ("smollm2", "fp8", "`--dtype` must be one of fp32, bf16, got 'fp8'"),
    ],
)
def test_a_slip_is_named(name: str, dtype: str, message: str) -> None:
    """A slip in a benchmark's option ends in a traceback, after the weights were converted."""
    with pytest.raises(typer.BadParameter, match=message):
        load_packaged(name, dtype)


def test_pages_say_which_clock_they_went_by() -> None:
    """A page of processor time reads as one of a wall clock."""
    assert [time_word(processor_time=one) for one in (False, True)] == ["time", "processor time of one thread"]
