"""Oracle of scheduling: survival, Algorithm 1, the asynchronous order, draft by draft (arXiv 2607.05147, Section 3.3).

A confidence c_k is the chance that draft k is accepted given that those before it are. A pass of a padded batch costs
`seconds[level]` when the longest row has `level` drafts; throughput is expected tokens over seconds.
"""

from __future__ import annotations

from collections.abc import Sequence


def survival(confidence: Sequence[float], limit: int) -> list[float]:
    """Return a_k = c_1 * ... * c_k of one row; a draft that the row has no room for is never accepted."""
    survivals = []
    product = 1.0
    for slot, chance in enumerate(confidence):
        product = product * chance
        survivals.append(product if slot < limit else 0.0)
    return survivals


def throughput(survivals: Sequence[Sequence[float]], num_live: int, seconds: Sequence[float], level: int) -> float:
    """Return the expected tokens per second of a round that verifies the first `level` drafts of every row."""
    tokens = float(num_live)
    for row in survivals:
        for slot in range(level):
            tokens += row[slot]
    return tokens / seconds[level]


def admitted_levels(survivals: Sequence[Sequence[float]], num_live: int, seconds: Sequence[float]) -> int:
    """Return how many levels Algorithm 1 admits: one after the other until one does not raise the throughput."""
    level = 0
    while level < len(survivals[0]):
        now = throughput(survivals, num_live, seconds, level)
        then = throughput(survivals, num_live, seconds, level + 1)
        if then <= now:
            break
        level += 1
    return level


def best_levels(survivals: Sequence[Sequence[float]], num_live: int, seconds: Sequence[float]) -> int:
    """Return the number of levels with the highest throughput, the smallest of equals."""
    best = 0
    for level in range(len(survivals[0]) + 1):
        candidate = throughput(survivals, num_live, seconds, level)
        if candidate > throughput(survivals, num_live, seconds, best):
            best = level
    return best


def admitted_drafts(survivals: Sequence[Sequence[float]], capacity: int, depth: int) -> list[int]:
    """Return how many drafts of each row a best-first search admits, `capacity` in all, none below `depth` levels.

    The search looks at one draft per row, the next one, and takes the best: the greatest survival, of equals the
    shallower draft, of those the upper row. What comes after a draft it has not taken it does not know.
    """
    taken = [0] * len(survivals)
    for _ in range(capacity):
        chosen = None
        for row in range(len(survivals)):
            slot = taken[row]
            if slot >= min(depth, len(survivals[row])):
                continue
            rank = (-survivals[row][slot], slot, row)
            if chosen is None or rank < chosen:
                chosen = rank
        if chosen is None:
            break
        taken[chosen[2]] += 1
    return taken
