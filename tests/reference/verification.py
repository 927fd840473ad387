"""Oracle of lossless verification: every outcome of a block and its exact probability, from the equations.

Of drafts x_1 to x_n, with w_0 = 1 and w_k = min(w_{k-1} p^t(x_k) / p^d(x_k), 1), a place k < n is chosen with chance
h_k = r_k / (r_k + 1 - w_k), where r_k = sum_x max(w_k p^t(x) - p^d(x), 0), and the place n with chance w_n; the last
chosen place is how many drafts are accepted, none if no place is. Behind k < n drafts the bonus token is drawn from
max(w_k p^t - p^d, 0), normalised, behind n from p^t (Sun et al., Algorithm 2). Token by token, a draft is accepted
with probability min(1, p^t(x_k) / p^d(x_k)) (Leviathan et al., Algorithm 1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

# tokens after the anchor so far -> probabilities of the next one
Distribution = Callable[[tuple[int, ...]], Sequence[float]]


def committed_probabilities(
    draft: Distribution, target: Distribution, num_verified: int
) -> dict[tuple[int, ...], float]:
    """Return how probable every committed text of one round is: accepted drafts and the bonus token."""
    committed: dict[tuple[int, ...], float] = defaultdict(float)
    for drafts, probability in _blocks((), 1.0, draft, num_verified):
        weights = prefix_weights(drafts, draft, target)
        for count, chance in enumerate(accepted_chances(drafts, draft, target)):
            if chance == 0:
                continue
            bonus = _bonus(drafts[:count], weights[count], draft, target, is_whole=count == num_verified)
            for token, p in enumerate(bonus):
                if p > 0:
                    committed[(*drafts[:count], token)] += probability * chance * p
    return dict(committed)


def accepted_chances(drafts: tuple[int, ...], draft: Distribution, target: Distribution) -> list[float]:
    """Return the chances that 0, 1, ... of these drafts are accepted."""
    weights = prefix_weights(drafts, draft, target)
    chosen = [1.0]
    for count in range(1, len(drafts) + 1):
        left = sum(_left(drafts[:count], weights[count], draft, target)) if count < len(drafts) else 0.0
        both = left + 1 - weights[count]
        chosen.append(weights[count] if count == len(drafts) else left / both if both > 0 else 0.0)
    later, chances = 1.0, []
    for chance in reversed(chosen):
        chances.append(later * chance)
        later *= 1 - chance
    return chances[::-1]


def accepted_chances_by_token(drafts: tuple[int, ...], draft: Distribution, target: Distribution) -> list[float]:
    """Return the same where every draft is accepted or rejected for itself."""
    chances, before = [], 1.0
    for count, token in enumerate(drafts):
        accept = min(1.0, target(drafts[:count])[token] / draft(drafts[:count])[token])
        chances.append(before * (1 - accept))
        before *= accept
    return [*chances, before]


def prefix_weights(drafts: tuple[int, ...], draft: Distribution, target: Distribution) -> list[float]:
    """Return w_0 to w_n."""
    weights = [1.0]
    for count, token in enumerate(drafts):
        ratio = target(drafts[:count])[token] / draft(drafts[:count])[token]
        weights.append(min(weights[-1] * ratio, 1.0))
    return weights


def _blocks(
    drafts: tuple[int, ...], probability: float, draft: Distribution, length: int
) -> Iterator[tuple[tuple[int, ...], float]]:
    if len(drafts) == length:
        yield drafts, probability
        return
    for token, p in enumerate(draft(drafts)):
        if p > 0:
            yield from _blocks((*drafts, token), probability * p, draft, length)


def _left(prefix: tuple[int, ...], weight: float, draft: Distribution, target: Distribution) -> list[float]:
    return [max(weight * p_t - p_d, 0.0) for p_d, p_t in zip(draft(prefix), target(prefix), strict=True)]


def _bonus(
    prefix: tuple[int, ...], weight: float, draft: Distribution, target: Distribution, *, is_whole: bool
) -> list[float]:
    left = list(target(prefix)) if is_whole else _left(prefix, weight, draft, target)
    return [value / sum(left) for value in left]


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


def greedy_outcome(draft_ids: Sequence[int], target_ids: Sequence[int], num_verified: int) -> tuple[int, int]:
    """Return how many drafts equal the target's choices from the first on, and the target's choice after them."""
    num_accepted = 0
    while num_accepted < num_verified and draft_ids[num_accepted] == target_ids[num_accepted]:
        num_accepted += 1
    return num_accepted, target_ids[num_accepted]
