"""A synthetic language that is learnt in minutes: a topic decides what follows a word, a name comes back far away."""

from __future__ import annotations

import math

import torch
from torch import Tensor

VOCAB_SIZE = 48
RECALL, FIRST_NAME, FIRST_TOPIC, FIRST_WORD = 3, 4, 12, 16
_NUM_NAMES, _NUM_TOPICS, _NUM_WORDS = 8, 4, 24
# tokens before the name comes back for the first time, more than the tiny target's window of 16
_DISTANCE = 20
_RECALL_RATE, _SLIP_RATE = 0.2, 0.04


def write_texts(count: int, length: int, seed: int) -> Tensor:
    """Return texts `(count, length)`: a name, a topic, then words, and now and then RECALL and the name again.

    A word follows from the last one and the topic, but for a slip in `_SLIP_RATE` of the cases. Rows of one seed are
    told from those of another, the language is always the same.
    """
    rules = torch.Generator().manual_seed(0)
    follows = torch.stack([torch.randperm(_NUM_WORDS, generator=rules) for _ in range(_NUM_TOPICS)])
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(size: int) -> Tensor:
        return torch.randint(size, (count,), generator=generator)

    def chance(rate: float) -> Tensor:
        return torch.rand(count, generator=generator) < rate

    names, topics, words = draw(_NUM_NAMES), draw(_NUM_TOPICS), draw(_NUM_WORDS)
    columns = [FIRST_NAME + names, FIRST_TOPIC + topics, FIRST_WORD + words]
    while len(columns) < length:
        is_name = columns[-1] == RECALL
        is_recall = ~is_name & chance(_RECALL_RATE if len(columns) > _DISTANCE else 0.0)
        next_words = torch.where(chance(_SLIP_RATE), draw(_NUM_WORDS), follows[topics, words])
        words = torch.where(is_name | is_recall, words, next_words)
        token_ids = torch.where(is_recall, torch.full_like(words, RECALL), FIRST_WORD + words)
        columns.append(torch.where(is_name, FIRST_NAME + names, token_ids))
    return torch.stack(columns, dim=1)


def bigram_entropy(texts: Tensor) -> float:
    """Return the nats per token that remain when only the last token is known."""
    counts = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    pairs = (texts[:, :-1].flatten(), texts[:, 1:].flatten())
    counts.index_put_(pairs, torch.ones(len(pairs[0]), dtype=torch.float64), accumulate=True)
    joint = counts / counts.sum()
    conditional = joint / joint.sum(-1, keepdim=True).clamp_min(1e-12)
    return -float(torch.special.xlogy(joint, conditional).sum())


def slip_entropy() -> float:
    """Return the nats per word that nobody can know: whether there is a slip, and to which word."""
    kept = 1 - _SLIP_RATE + _SLIP_RATE / _NUM_WORDS
    other = _SLIP_RATE / _NUM_WORDS
    return -kept * math.log(kept) - (_NUM_WORDS - 1) * other * math.log(other)
