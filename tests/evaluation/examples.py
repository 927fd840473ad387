"""Rounds, models and evaluations to test with."""

from __future__ import annotations

import random
from itertools import pairwise

import torch
from torch import Tensor

from dspark_hf import DSparkAssistantModel
from dspark_hf.evaluation.loading import Models
from dspark_hf.evaluation.records import RoundRecord
from tests.tiny import VOCAB_SIZE, tiny_target

BLOCK_SIZE = 5


def random_rounds(seed: int, num_rounds: int = 12) -> list[RoundRecord]:
    """Return rounds that verified every draft, the last one cut by a stop rule; some had room for fewer drafts."""
    generator = random.Random(seed)
    rounds = []
    for number in range(num_rounds):
        is_last = number == num_rounds - 1
        num_drafted = generator.randint(0, BLOCK_SIZE) if is_last else BLOCK_SIZE
        num_accepted = generator.randint(0, num_drafted)
        num_committed = generator.randint(1, num_accepted + 1) if is_last else num_accepted + 1
        confidence = tuple(generator.random() for _ in range(num_drafted)) or None
        rounds.append(RoundRecord(num_drafted, num_drafted, num_accepted, num_committed, confidence))
    return rounds


def tiny_models(names: tuple[str, ...] = ("dspark",), *, with_confidence: bool = True) -> Models:
    """Return a tiny target and untrained drafters for it."""
    target = tiny_target()
    drafters = {}
    for name in names:
        # larger weights than fresh ones, so that confidences lie on both sides of a half
        drafters[name] = DSparkAssistantModel.from_target(
            target,
            num_hidden_layers=1,
            markov_rank=8,
            block_size=BLOCK_SIZE,
            initializer_range=0.5,
            enable_confidence_head=with_confidence,
        ).eval()
    return Models(target, None, drafters)


def tiny_sets(**counts: int) -> dict[str, list[Tensor]]:
    """Return sets of random prompts of different lengths, as many of each as is said."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: [torch.randint(2, VOCAB_SIZE, (1, 3 + 2 * index), generator=generator) for index in range(count)]
        for name, count in counts.items()
    }


def is_falling(values: list[float]) -> bool:
    """Return whether no value is larger than the one before it."""
    return all(later <= earlier + 1e-12 for earlier, later in pairwise(values))
