"""Rates of acceptance along given texts are those that decoding finds."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.accept_rates import blocks_behind, num_right, rates_of
from benchmarks.recordings import record
from benchmarks.simulation import random_target
from dspark_hf import DSparkAssistantModel


def test_blocks_behind_a_text_are_those_that_decoding_drafts():
    """One pass over a whole text drafts otherwise than decoding does round by round."""
    torch.manual_seed(0)
    target: Any = random_target("tiny", torch.float32, "cpu")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=4)
    prompt = torch.arange(5, 17)
    (text,) = record(target, drafter, [prompt], 12)
    blocks = blocks_behind(target, drafter, text.prompt, text.token_ids[:12]).tolist()
    assert [tuple(block) for block in blocks] == [block.token_ids for block in text.blocks]


def test_rates_count_drafts_behind_right_ones_alone():
    """A rate counts drafts behind a wrong one, or a block that the text ends in as all right."""
    assert [num_right(block, [1, 2, 3]) for block in ([1, 2, 3, 4], [1, 9, 3], [9, 2])] == [3, 1, 0]
    assert rates_of([0, 1, 1, 2], 2) == [0.75, 0.333]
