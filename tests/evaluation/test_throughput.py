"""Speeds from answers, by hand."""

from __future__ import annotations

import pytest

from dspark_hf.evaluation.records import Answer
from dspark_hf.evaluation.throughput import summarize_speed


def _answer(seconds: float, *rows: tuple[int, ...]) -> Answer:
    return Answer(rows, seconds)


def test_ratios_are_of_the_same_repeat():
    """A slow minute that hit both ways makes the drafter look fast or slow."""
    plain = [[_answer(1.0, (1, 2)), _answer(10.0, (1, 2))], [_answer(1.0, (3, 4)), _answer(10.0, (3, 4))]]
    assisted = [[_answer(0.5, (1, 2)), _answer(5.0, (1, 2))], [_answer(0.5, (3, 4)), _answer(5.0, (3, 4))]]
    speed = summarize_speed(plain, assisted, scheduler="fixed", batch_size=1, is_greedy=True)
    assert (speed.ratio, speed.lowest_ratio, speed.highest_ratio) == pytest.approx((2, 2, 2))
    assert speed.plain_tokens_per_second == pytest.approx((4 / 2 + 4 / 20) / 2)


def test_tokens_are_over_all_prompts():
    """A short prompt counts as much as a long one: the speed is no longer tokens per second."""
    plain = [[_answer(1.0, (1,))], [_answer(3.0, (1, 2, 3, 4, 5, 6, 7))]]
    speed = summarize_speed(plain, plain, scheduler="fixed", batch_size=1, is_greedy=True)
    assert speed.tokens_per_second == pytest.approx(2)
    assert speed.ratio == 1


def test_one_wrong_repeat_is_a_mismatch():
    """A text that differs only sometimes is reported as identical."""
    plain = [[_answer(1, (1, 2), (3,)), _answer(1, (1, 2), (3,))], [_answer(1, (4,)), _answer(1, (4,))]]
    assisted = [[_answer(1, (1, 2), (3,)), _answer(1, (1, 9), (3,))], [_answer(1, (4,)), _answer(1, (4,))]]
    speed = summarize_speed(plain, assisted, scheduler="fixed", batch_size=2, is_greedy=True)
    assert (speed.num_identical, speed.num_outputs) == (2, 3)
    assert summarize_speed(plain, assisted, scheduler="fixed", batch_size=2, is_greedy=False).num_identical is None
