"""A small target, a drafter for it, and how odd the frequencies of its texts are.

n samples, S prompt length, V vocab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from dspark_hf import DSparkAssistantModel
from tests.reference.sampling import p_value
from tests.tiny import tiny_target

VOCAB_SIZE = 6
BLOCK_SIZE = 3
PROMPT = torch.tensor([2, 3, 4, 5, 1])


class PrefixDependent(LogitsProcessor):
    """Add a bias that depends on every token of the prefix; token 0, which pads, counts nothing."""

    depends_on_prefix_alone = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 2 * torch.sin(input_ids.sum(-1, keepdim=True) + torch.arange(scores.shape[1]))


def small_target(**overrides: Any) -> PreTrainedModel:
    """Return a target small enough to enumerate its texts."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return tiny_target(vocab_size=VOCAB_SIZE, **sizes, **heads, **overrides)


def untrained_drafter(target: PreTrainedModel, **fields: Any) -> DSparkAssistantModel:
    """Return a drafter with random weights that makes every draft itself, and verifies all."""
    # larger weights than fresh ones: every head has a say, and the drafts are far from the target's distribution
    options = {"num_hidden_layers": 1, "markov_rank": 4, "block_size": BLOCK_SIZE, "initializer_range": 0.5}
    drafter = DSparkAssistantModel.from_target(target, **{**options, **fields})
    # a few tokens are too few for a scheduler to learn from: every draft is verified
    drafter.scheduler = "fixed"
    drafter.drafts = "model"
    return drafter


def smallest_p_value(samples: Tensor, probabilities: Tensor, span: int = 3) -> float:
    """Return the smaller p-value of the joint frequencies of the first and of the last `span` tokens."""
    length = probabilities.ndim
    after, before = tuple(range(span, length)), tuple(range(length - span))
    return min(
        p_value(samples[:, :span], probabilities.sum(after)), p_value(samples[:, -span:], probabilities.sum(before))
    )
