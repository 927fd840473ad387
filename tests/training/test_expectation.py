"""What is expected of a training run is what such runs have brought."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from dspark_hf.training.expectation import Curve, range_of, strength, worth_of

REPOSITORY = Path(__file__).parent.parent.parent
BLOCKS_PER_STEP = 4 * 128
# blocks, layers, tokens of text, held-out tau
Point = tuple[float, int, int, float]


def _points(log: str, layers: int, num_tokens: int, steps_before: int) -> list[Point]:
    lines = (REPOSITORY / "drafters" / log).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [
        (BLOCKS_PER_STEP * (steps_before + one["step"]), layers, num_tokens, one["eval_expected_tau"])
        for one in records
    ]


def _runs() -> dict[str, list[Point]]:
    runs = {
        "gemma": _points("gemma3-270m/training_log_1.jsonl", 1, 78_000, 0),
        "smollm2": _points("smollm2-135m-instruct/training_log_2.jsonl", 2, 480_000, 1600),
    }
    table = (REPOSITORY / "benchmarks" / "drafters.md").read_text(encoding="utf-8")
    for name, tau in re.findall(r"^\| ([\w-]+) \| [\d.]+ M \| ([\d.]+) \|", table, re.MULTILINE):
        layers = int(found[1]) if (found := re.search(r"(\d)-layer", name)) else 2
        runs[name] = [(BLOCKS_PER_STEP * 120, layers, 480_000, float(tau))]
    return runs


RUNS = _runs()
# an optimiser that is not the default, and learns more slowly
FITTED = {name: points for name, points in RUNS.items() if name != "vanilla-adamw"}


def _fit(runs: dict[str, list[Point]]) -> Curve:
    """Return the curve with the least relative error in tau; every run weighs as one."""
    best = (math.inf, Curve())
    for power in np.linspace(0, 0.6, 61):
        rows, wanted, weights = [], [], []
        for points in runs.values():
            for blocks, layers, num_tokens, tau in points:
                scale = strength(num_tokens, layers, float(power))
                # tau - 1 = s b / (r b + h): s / (tau - 1) = r + h / b
                rows.append([1.0, 1e5 / worth_of(blocks, num_tokens)])
                wanted.append(scale / (tau - 1))
                weights.append((tau - 1) ** 2 / scale / tau / math.sqrt(len(points)))
        weight = np.array(weights)
        found, *_ = np.linalg.lstsq(np.array(rows) * weight[:, None], np.array(wanted) * weight, rcond=None)
        error = float((((np.array(rows) @ found - np.array(wanted)) * weight) ** 2).sum())
        best = min(best, (error, Curve(float(found[0]), float(found[1]) * 1e5, float(power))), key=lambda one: one[0])
    return best[1]


def _errors(curve: Curve, points: list[Point]) -> list[float]:
    return [
        curve.tau(blocks, num_tokens=num_tokens, layers=layers) / tau - 1 for blocks, layers, num_tokens, tau in points
    ]


def test_the_numbers_are_those_of_the_logs() -> None:
    """The curve's numbers come from nowhere, or from logs that were replaced since."""
    fitted, stored = _fit(FITTED), Curve()
    assert len(FITTED) == 13
    assert stored.rest == pytest.approx(fitted.rest, rel=0.01)
    assert stored.half == pytest.approx(fitted.half, rel=0.01)
    assert stored.layers_power == pytest.approx(fitted.layers_power, abs=0.01)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_predicted_from_the_others(name: str) -> None:
    """Somebody spends a night on a drafter that was never going to be as good as was said."""
    others = {other: points for other, points in FITTED.items() if other != name}
    assert max(map(abs, _errors(_fit(others), RUNS[name]))) < 0.15


def test_more_is_never_worse() -> None:
    """More blocks, text or layers would be said to bring less."""
    curve = Curve()
    taus = [curve.tau(blocks, num_tokens=100_000, layers=2) for blocks in (0, 1e4, 1e5, 1e6, 1e7)]
    assert taus[0] == 1
    assert taus == sorted(taus)
    # the same text over and over: no more than so many passes are worth
    assert taus[-1] == pytest.approx(curve.tau(1e9, num_tokens=100_000, layers=2), abs=1e-3)
    assert curve.tau(1e6, num_tokens=10_000_000, layers=2) > curve.tau(1e6, num_tokens=480_000, layers=2)
    assert curve.tau(1e6, num_tokens=480_000, layers=3) > curve.tau(1e6, num_tokens=480_000, layers=2)
    assert curve.tau(1e9, num_tokens=10**12, layers=5, block_size=4) == 5


def test_a_drafter_goes_on_where_it_is() -> None:
    """A good drafter would be said to become worse, or to begin at nothing."""
    curve, text = Curve(), {"num_tokens": 480_000, "layers": 2}
    start = curve.tau(300_000, **text)
    assert curve.blocks_of(start, **text) == pytest.approx(300_000)
    assert curve.tau_after(start, 0, **text) == pytest.approx(start)
    assert curve.tau_after(start, 100_000, **text) == pytest.approx(curve.tau(400_000, **text))
    assert curve.tau_after(4.0, 100_000, **text) == 4.0


@pytest.mark.parametrize(
    ("log", "num_tokens"),
    [
        ("gemma3-270m/training_log_1.jsonl", 78_000),
        ("smollm2-135m-instruct/training_log_2.jsonl", 480_000),
    ],
)
def test_a_run_s_own_evaluations_tell_its_end(log: str, num_tokens: int) -> None:
    """What an evening brings is still unknown when a quarter of it is over."""
    # the second of them was not the first round: its steps count from its own beginning
    points = [(blocks, tau) for blocks, _, _, tau in _points(log, 1, num_tokens, 0) if blocks > 0]
    end, tau = points[-1]
    for count in range(2, len(points)):
        found = Curve().tau_seen(points[:count], end, num_tokens=num_tokens)
        assert found == pytest.approx(tau, rel=0.06), count


@pytest.mark.parametrize(("ease", "had"), [(1.0, 0.0), (3.0, 60_000.0), (0.4, 900_000.0)])
def test_evaluations_tell_how_easy_a_text_is(ease: float, had: float) -> None:
    """An easy text, or a drafter that knew much, is expected to bring what others bring."""
    curve = Curve()

    def tau(blocks: float) -> float:
        worth = had + worth_of(blocks, 150_000)
        return 1 + ease * worth / (curve.rest * worth + curve.half)

    seen = [(blocks, tau(blocks)) for blocks in (40_000.0, 80_000.0, 120_000.0)]
    assert curve.tau_seen(seen, 500_000, num_tokens=150_000) == pytest.approx(tau(500_000), rel=0.01)
    assert curve.tau_seen([(1e5, 7.5), (2e5, 7.9)], 1e6, num_tokens=10**6, block_size=7) == 8


def test_what_no_run_has_shown_is_named() -> None:
    """A guess is told like a measurement."""
    assert range_of(1e6, 400_000, 2) is None
    assert range_of(1e8, 400_000, 5) == (
        "100,000,000 blocks (fitted on 51,000 to 1,640,000), 5 layers (fitted on 1 to 3)"
    )
