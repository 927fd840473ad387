"""Measure steps in turns, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeVar

_Step = TypeVar("_Step")


def measure(
    steps: Sequence[_Step],
    seconds_of: Callable[[_Step], float],
    *,
    repeats: int = 5,
    advance: Callable[[], None] = lambda: None,
) -> dict[_Step, float]:
    """Return every step's time, the lower quartile of `repeats` turns: disturbances only ever add.

    A first turn that is not counted lets kernels be chosen and memory be found.

    Args:
        steps: what to measure.
        seconds_of: runs a step and returns its seconds.
        repeats: turns that count.
        advance: called after every run, `(repeats + 1) * len(steps)` times.
    """
    times: dict[_Step, list[float]] = {step: [] for step in steps}
    for turn in range(repeats + 1):
        # another step goes first each time
        first = turn * len(steps) // (repeats + 1)
        for step in [*steps[first:], *steps[:first]]:
            seconds = seconds_of(step)
            if turn:
                times[step].append(seconds)
            advance()
    return {step: sorted(samples)[(repeats - 1) // 4] for step, samples in times.items()}


def timed(run: Callable[[], object], wait: Callable[[], object]) -> float:
    """Return the seconds that `run` takes until `wait` has returned."""
    wait()
    start = perf_counter()
    run()
    wait()
    return perf_counter() - start
