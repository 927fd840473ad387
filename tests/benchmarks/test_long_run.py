"""The benchmark of long batches: what it times, and that it finds what a cache leaves behind."""

from __future__ import annotations

import torch

from benchmarks.loads import make_load, random_prompts
from benchmarks.long_run import Step, by_piece, run_drafting, run_plain
from benchmarks.simulation import random_target
from dspark_hf import DSparkAssistantModel


def test_steps_are_grouped_by_piece_and_width():
    """Steps of one part of the text, or passes of another width, count for another."""
    steps = [Step(100 + index, 0.001 * (1 + index // 10)) for index in range(20)]
    steps += [Step(105, 5.0, width=4)] * 8
    assert by_piece(steps, 100, 10, 1) == {0: 1.0, 1: 2.0}
    assert by_piece(steps, 100, 10, 4) == {0: 5000.0}


def test_every_step_is_timed():
    """Steps are left out, or hardly anything is rejected, so that nothing could be left behind."""
    target = random_target("tiny", torch.float32, "cpu")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=7)
    load = make_load(random_prompts(2, 256, seed=0), 0, target.device, {"do_sample": False, "eos_token_id": None})
    length = load.token_ids.shape[1]
    plain = run_plain(target, load, 24)
    assert [step.context_length for step in plain] == list(range(length, length + 23))
    rounds, num_rejected = run_drafting(target, drafter, load, 24, 3)
    assert all(step.width <= 4 and step.seconds > 0 for step in rounds)
    assert num_rejected > len(rounds)
