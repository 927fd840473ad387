"""Oracle of lossless verification: every outcome of a block and its exact probability, from the equations.

A draft x_k drawn from p^d is accepted with probability min(1, p^t(x_k) / p^d(x_k)); the first rejection draws from
max(p^t - p^d, 0), normalised; a block without one draws from p^t (Leviathan et al., Algorithm 1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

# tokens after the anchor so far -> probabilities of the next one
Distribution = Callable[[tuple[int, ...]], Sequence[float]]


def committed_probabilities(
    draft: Distribution, target: Distribution, num_verified: int
) -> dict[tuple[int, ...], float]:
    """Return how probable every committed text of one round is: accepted drafts and the bonus token."""
    committed: dict[tuple[int, ...], float] = defaultdict(float)
    _verify_next((), 1.0, draft, target, num_verified, committed)
    return dict(committed)


def _verify_next(
    accepted: tuple[int, ...],
    probability: float,
    draft: Distribution,
    target: Distribution,
    num_verified: int,
    committed: dict[tuple[int, ...], float],
) -> None:
    p_target = target(accepted)
    if len(accepted) == num_verified:
        for token, p in enumerate(p_target):
            if p > 0:
                committed[(*accepted, token)] += probability * p
        return
    p_draft = draft(accepted)
    rejected = 0.0
    for token, (p_d, p_t) in enumerate(zip(p_draft, p_target, strict=True)):
        if p_d == 0:
            continue
        accept = min(1.0, p_t / p_d)
        rejected += p_d * (1 - accept)
        if accept > 0:
            _verify_next((*accepted, token), probability * p_d * accept, draft, target, num_verified, committed)
    residual = [max(p_t - p_d, 0.0) for p_d, p_t in zip(p_draft, p_target, strict=True)]
    for token, p in enumerate(residual):
        if p > 0:
            committed[(*accepted, token)] += probability * rejected * p / sum(residual)


def continued_probabilities(
    committed: dict[tuple[int, ...], float], target: Distribution, length: int
) -> dict[tuple[int, ...], float]:
    """Return how probable every text of `length` tokens is if the target writes on after what a round committed."""
    texts: dict[tuple[int, ...], float] = defaultdict(float)
    for text, probability in committed.items():
        _write_on(text, probability, target, length, texts)
    return dict(texts)


def _write_on(
    text: tuple[int, ...],
    probability: float,
    target: Distribution,
    length: int,
    texts: dict[tuple[int, ...], float],
) -> None:
    if len(text) == length:
        texts[text] += probability
        return
    for token, p in enumerate(target(text)):
        if p > 0:
            _write_on((*text, token), probability * p, target, length, texts)


def accept_rate(p_draft: Sequence[float], p_target: Sequence[float]) -> float:
    """Return the chance 1 - |p^d - p^t| / 2 that a draft is accepted (Eq. 8)."""
    return 1 - sum(abs(p_d - p_t) for p_d, p_t in zip(p_draft, p_target, strict=True)) / 2


def greedy_outcome(draft_ids: Sequence[int], target_ids: Sequence[int], num_verified: int) -> tuple[int, int]:
    """Return how many drafts equal the target's choices from the first on, and the target's choice after them."""
    num_accepted = 0
    while num_accepted < num_verified and draft_ids[num_accepted] == target_ids[num_accepted]:
        num_accepted += 1
    return num_accepted, target_ids[num_accepted]
