"""The benchmark of requests: all ways answer all of them, and their times are counted from the start."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from benchmarks.loads import random_prompts
from benchmarks.simulation import random_target
from benchmarks.streaming import ALONE, SHORTEST, Run, Ways, make_requests, table
from dspark_hf import DSparkAssistantModel


def test_all_ways_write_the_same_texts():
    """A way leaves requests out, writes more than was asked for, or hands texts out in another order."""
    target = random_target("tiny", torch.float32, "cpu")
    target.generation_config.eos_token_id = 7
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=7)
    requests = make_requests([prompt.tolist() for prompt in random_prompts(5, 256, seed=0)], 12, seed=0)
    runs = {way: answer(requests, count().__next__) for way, answer in Ways(target, drafter, 2).by_name().items()}
    assert len(runs) == 4
    for run in runs.values():
        assert run.texts == runs[ALONE].texts
        assert len(run.times) == len(requests)
    for text, request in zip(runs[ALONE].texts, requests, strict=True):
        assert len(text) == request.options["max_new_tokens"] or text[-1] == 7
    # the clock counts how often it is asked: once at the start, then after each batch or request
    assert runs[ALONE].times == [1, 2, 3, 4, 5]
    assert runs["batches"].times == [1, 1, 2, 2, 3]
    assert sorted(runs["stream, drafter"].times) == [1, 2, 3, 4, 5]


def test_requests_differ_in_length():
    """All requests end together, so that a stream has nothing to gain."""
    lengths = [one.options["max_new_tokens"] for one in make_requests([[1]] * 50, 64, seed=0)]
    assert SHORTEST <= min(lengths) < 20 and 50 < max(lengths) <= 64


def test_table_compares_run_by_run():
    """A slow run of one way is compared with a fast one of another, or a wrong text is not seen."""
    alone = [Run([[1, 2], [3, 4]], [1.0, 2.0]), Run([[1, 2], [3, 4]], [10.0, 20.0])]
    ours = [Run([[1, 2], [3, 4]], [0.5, 1.0]), Run([[1, 2], [3, 5]], [5.0, 10.0])]
    assert ours[0].num_tokens / ours[0].seconds == pytest.approx(4)
    row = table({ALONE: alone, "ours": ours}, ALONE)[-1]
    assert row == "| ours | 2.2 | 2.00 | 0.50 | 3 of 4 |"
