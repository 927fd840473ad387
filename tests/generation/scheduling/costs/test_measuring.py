"""Steps measured in turns."""

from __future__ import annotations

from collections import Counter

from dspark_hf.generation.scheduling.costs.measuring import measure, timed


def test_the_first_turn_does_not_count():
    """Choosing kernels and finding memory is taken for the cost of a step."""
    runs: Counter[str] = Counter()

    def seconds_of(step: str) -> float:
        runs[step] += 1
        return 100.0 if runs[step] == 1 else {"a": 1.0, "b": 2.0}[step]

    advances = []
    assert measure(["a", "b"], seconds_of, repeats=4, advance=lambda: advances.append(None)) == {"a": 1.0, "b": 2.0}
    assert len(advances) == 10


def test_a_disturbance_does_not_count():
    """A slow moment of the machine makes a step dear."""
    samples = iter([0.0, 5.0, 1.1, 9.0, 1.0, 7.0])
    assert measure(["a"], lambda _: next(samples), repeats=5) == {"a": 1.1}
    assert measure(["a"], lambda _: 3.0, repeats=1) == {"a": 3.0}


def test_steps_take_turns():
    """A slow minute hits one step alone."""
    order: list[int] = []

    def seconds_of(step: int) -> float:
        order.append(step)
        return 0.0

    measure(range(3), seconds_of, repeats=2)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]


def test_timed_waits_before_and_after():
    """Work that still runs is counted, or work that was started is not."""
    calls: list[str] = []
    assert timed(lambda: calls.append("run"), lambda: calls.append("wait")) >= 0
    assert calls == ["wait", "run", "wait"]
