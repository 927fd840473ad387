"""Verification commits text that follows the target's distribution, whatever was drafted.

B batch, K drafts, V vocab.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dspark_hf.generation.verification import verify, verify_greedy
from tests.reference.sampling import SMALLEST_P_VALUE, p_value
from tests.reference.verification import (
    accepted_chances,
    accepted_chances_by_token,
    committed_probabilities,
    continued_probabilities,
    greedy_outcome,
)

NUM_ROWS = 60_000
NUM_DRAFTS = 3
VOCAB_SIZE = 5
# five standard errors: a correct mean lies outside once in two million seeds
SIGMAS = 5.0

# tables [K + 1, V, V] of what follows slot k's previous token, for the draft and for the target
Tables = tuple[Tensor, Tensor]


def _random(scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(NUM_DRAFTS + 1, VOCAB_SIZE, VOCAB_SIZE, generator=generator)).softmax(-1)


def _one_hot(seed: int) -> Tensor:
    return torch.nn.functional.one_hot(_random(1.0, seed).argmax(-1), VOCAB_SIZE).float()


def _only(table: Tensor, allowed: list[int]) -> Tensor:
    mask = torch.zeros(VOCAB_SIZE)
    mask[allowed] = 1.0
    return table * mask / (table * mask).sum(-1, keepdim=True)


TABLES: dict[str, Tables] = {
    "far apart": (_random(1.5, 0), _random(1.5, 1)),
    "close": (_random(1.0, 0), (_random(1.0, 0) + 0.05) / (1 + 0.05 * VOCAB_SIZE)),
    "equal": (_random(1.0, 0), _random(1.0, 0)),
    "uniform draft": (torch.full_like(_random(1.0, 0), 1 / VOCAB_SIZE), _random(1.5, 1)),
    "one-hot draft": (_one_hot(0), _random(1.0, 1)),
    "one-hot target": (_random(1.0, 0), _one_hot(1)),
    # as after a top-k that keeps other tokens on either side
    "overlapping": (_only(_random(1.0, 0), [0, 1, 2]), _only(_random(1.0, 1), [1, 2, 3, 4])),
    "disjoint": (_only(_random(1.0, 0), [0, 1]), _only(_random(1.0, 1), [2, 3, 4])),
}


def _drafted(tables: Tables, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return drafts `(B, K)` drawn one after the other, and both distributions along them; the anchor is token 0."""
    previous = torch.zeros(num_rows, dtype=torch.long)
    draft_ids, draft_probs, target_probs = [], [], []
    for slot in range(NUM_DRAFTS + 1):
        draft_probs.append(tables[0][slot, previous])
        target_probs.append(tables[1][slot, previous])
        previous = torch.multinomial(draft_probs[-1], 1).squeeze(-1)
        draft_ids.append(previous)
    return (
        torch.stack(draft_ids[:-1], dim=1),
        torch.stack(draft_probs[:-1], dim=1),
        torch.stack(target_probs, dim=1),
    )


def _table_lookup(table: Tensor) -> Callable[[tuple[int, ...]], list[float]]:
    values = table.double().tolist()
    return lambda text: values[len(text)][text[-1] if text else 0]


def _expected(tables: Tables, num_verified: int) -> Tensor:
    """Return the oracle's probabilities as a tensor `(V + 1,) * (K + 1)`; index V stands for no token."""
    committed = committed_probabilities(_table_lookup(tables[0]), _table_lookup(tables[1]), num_verified)
    probabilities = torch.zeros([VOCAB_SIZE + 1] * (NUM_DRAFTS + 1), dtype=torch.float64)
    for text, probability in committed.items():
        probabilities[(*text, *[VOCAB_SIZE] * (NUM_DRAFTS + 1 - len(text)))] = probability
    return probabilities


def _committed(draft_ids: Tensor, num_accepted: Tensor, bonus: Tensor) -> Tensor:
    slots = torch.arange(NUM_DRAFTS + 1)
    drafts = torch.nn.functional.pad(draft_ids, (0, 1))
    text = drafts.where(slots < num_accepted[:, None], VOCAB_SIZE)
    return text.where(slots != num_accepted[:, None], bonus[:, None])


def _cycled_limits(num_rows: int) -> Tensor:
    return torch.arange(num_rows) % (NUM_DRAFTS + 1)


def _assert_mean(samples: Tensor, mean: float, variance: float) -> None:
    """Assert that the mean of n samples lies within `SIGMAS` standard errors, sqrt(variance / n)."""
    assert abs(float(samples.double().mean()) - mean) <= SIGMAS * math.sqrt(variance / len(samples)) + 1e-7


@pytest.mark.parametrize("num_verified", range(NUM_DRAFTS + 1))
@pytest.mark.parametrize("kind", TABLES)
def test_oracle_is_lossless(kind, num_verified):
    """The oracle itself does not leave the target's distribution as it is."""
    draft, target = map(_table_lookup, TABLES[kind])
    committed = committed_probabilities(draft, target, num_verified)
    texts = continued_probabilities(committed, target, NUM_DRAFTS + 1)
    direct = continued_probabilities({(): 1.0}, target, NUM_DRAFTS + 1)
    assert texts.keys() <= direct.keys()
    # the tables are rounded to fp32
    assert all(texts.get(text, 0.0) == pytest.approx(direct[text], abs=1e-6) for text in direct)


@pytest.mark.parametrize("kind", TABLES)
def test_committed_text_follows_the_oracle(kind):
    """Sampled text does not follow the target: accepted drafts or the bonus token come from a wrong distribution."""
    tables = TABLES[kind]
    draft_ids, draft_probs, target_probs = _drafted(tables, NUM_ROWS)
    limits = _cycled_limits(NUM_ROWS)
    num_accepted, bonus = verify(draft_ids, draft_probs, target_probs, limits)
    assert bool((num_accepted <= limits).all())
    committed = _committed(draft_ids, num_accepted, bonus)
    for num_verified in range(NUM_DRAFTS + 1):
        samples = committed[limits == num_verified]
        assert p_value(samples, _expected(tables, num_verified)) > SMALLEST_P_VALUE


def _expected_survivals(tables: Tables, chances: Callable[..., list[float]]) -> list[float]:
    """Return the chances that at least 1, 2, ... drafts are accepted, over all blocks."""
    draft, target = map(_table_lookup, tables)
    survivals = [0.0] * NUM_DRAFTS
    for drafts in itertools.product(range(VOCAB_SIZE), repeat=NUM_DRAFTS):
        probability = math.prod(draft(drafts[:k])[token] for k, token in enumerate(drafts))
        if probability > 0:
            counts = chances(drafts, draft, target)
            for k in range(NUM_DRAFTS):
                survivals[k] += probability * sum(counts[k + 1 :])
    return survivals


@pytest.mark.parametrize("kind", ["far apart", "close", "one-hot draft", "overlapping"])
def test_number_of_accepted_drafts_is_the_expected_one(kind):
    """Fewer drafts are accepted than losslessness allows: decoding is slower than it could be."""
    survivals = _expected_survivals(TABLES[kind], accepted_chances)
    num_accepted, _ = verify(*_drafted(TABLES[kind], NUM_ROWS), torch.full((NUM_ROWS,), NUM_DRAFTS))
    for k, survival in enumerate(survivals):
        _assert_mean(num_accepted > k, survival, survival * (1 - survival))
    # E[n] = sum of survivals, E[n^2] = sum of (2 k + 1) survival_k
    mean = sum(survivals)
    _assert_mean(num_accepted, mean, sum((2 * k + 1) * s for k, s in enumerate(survivals)) - mean**2)


@pytest.mark.parametrize("kind", TABLES)
def test_a_block_at_once_accepts_no_fewer_than_token_by_token(kind):
    """Blocks are verified at once for nothing."""
    at_once = sum(_expected_survivals(TABLES[kind], accepted_chances))
    by_token = sum(_expected_survivals(TABLES[kind], accepted_chances_by_token))
    assert at_once >= by_token - 1e-6
    if kind in ("far apart", "overlapping"):
        assert at_once > 1.01 * by_token


def test_equal_distributions_accept_everything():
    """A drafter that equals the target has drafts rejected."""
    limits = _cycled_limits(NUM_ROWS)
    num_accepted, _ = verify(*_drafted(TABLES["equal"], NUM_ROWS), limits)
    assert torch.equal(num_accepted, limits)


def test_disjoint_supports_accept_nothing():
    """A token that the target never writes is accepted."""
    num_accepted, bonus = verify(*_drafted(TABLES["disjoint"], NUM_ROWS), _cycled_limits(NUM_ROWS))
    assert int(num_accepted.max()) == 0
    assert int(bonus.min()) >= 2


def test_rounding_may_not_break_a_row():
    """Distributions equal up to rounding, their residual all zero, raise an error or give an impossible token."""
    target_probs = torch.tensor([[[0.0, 0.3, 0.7], [0.0, 0.3, 0.7]]]).repeat(NUM_ROWS, 1, 1)
    # larger everywhere by rounding: a rejection leaves no residual
    draft_probs = target_probs[:, :1] * 1.01
    draft_ids = torch.multinomial(draft_probs[:, 0], 1)
    num_accepted, bonus = verify(draft_ids, draft_probs, target_probs, torch.ones(NUM_ROWS, dtype=torch.long))
    assert bool((num_accepted == 0).any())
    assert int(bonus.min()) >= 1


def test_rows_are_independent():
    """The outcome of one row depends on its neighbours."""
    kinds = list(TABLES)
    parts = [_drafted(TABLES[kind], NUM_ROWS // len(kinds)) for kind in kinds]
    # neighbours are of different kinds
    draft_ids, draft_probs, target_probs = (
        torch.stack(tensors, dim=1).flatten(0, 1) for tensors in zip(*parts, strict=True)
    )
    limits = torch.full((len(draft_ids),), NUM_DRAFTS)
    num_accepted, bonus = verify(draft_ids, draft_probs, target_probs, limits)
    committed = _committed(draft_ids, num_accepted, bonus)
    for index, kind in enumerate(kinds):
        assert p_value(committed[index :: len(kinds)], _expected(TABLES[kind], NUM_DRAFTS)) > SMALLEST_P_VALUE

    num_accepted, bonus = verify(*_drafted(TABLES["close"], NUM_ROWS), torch.full((NUM_ROWS,), NUM_DRAFTS))
    for values in (num_accepted.double(), bonus.double()):
        # of n independent pairs the correlation has standard error 1 / sqrt(n)
        correlation = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
        assert abs(float(correlation)) < SIGMAS / math.sqrt(NUM_ROWS)


@pytest.mark.parametrize("mistake", ["bonus from the target", "draft probabilities of another slot", "no bonus limit"])
def test_statistic_finds_a_wrong_verification(mistake):
    """The frequency tests of this file would pass for a verification that is not lossless."""
    tables = TABLES["far apart"]
    draft_ids, draft_probs, target_probs = _drafted(tables, NUM_ROWS)
    limits = torch.full((NUM_ROWS,), 2)
    if mistake == "draft probabilities of another slot":
        num_accepted, bonus = verify(draft_ids, draft_probs.roll(1, dims=1), target_probs, limits)
    else:
        num_accepted, bonus = verify(draft_ids, draft_probs, target_probs, limits)
        rows = torch.arange(NUM_ROWS)
        wrong = target_probs[rows, num_accepted]
        if mistake == "no bonus limit":
            # a residual although nothing was rejected: the last verified draft was accepted
            residual = (wrong - draft_probs[rows, num_accepted]).clamp_min(0)
            wrong = torch.where((num_accepted == limits)[:, None], residual, wrong)
        bonus = torch.multinomial(wrong, 1).squeeze(-1)
    assert p_value(_committed(draft_ids, num_accepted, bonus), _expected(tables, 2)) < SMALLEST_P_VALUE


def test_greedy_accepts_the_common_prefix():
    """Greedy text differs from the target's, or drafts that were not verified are accepted."""
    # two tokens only, so that long prefixes agree
    draft_ids = torch.randint(2, (500, NUM_DRAFTS))
    target_ids = torch.randint(2, (500, NUM_DRAFTS + 1))
    limits = _cycled_limits(500)
    num_accepted, bonus = verify_greedy(draft_ids, target_ids, limits)
    rows = zip(draft_ids.tolist(), target_ids.tolist(), limits.tolist(), strict=True)
    expected = [greedy_outcome(*row) for row in rows]
    assert list(zip(num_accepted.tolist(), bonus.tolist(), strict=True)) == expected
    assert {count for count, _ in expected} == set(range(NUM_DRAFTS + 1))


@pytest.mark.parametrize("kind", ["none drawn", "some drawn"])
def test_certain_drafts_keep_the_distribution(kind):
    """A draft that nobody drew counts as drawn, so that the first token does not follow the target."""
    num_rows, target_probs = 20_000, torch.tensor([0.1, 0.4, 0.2, 0.3])
    draft_ids = torch.tensor([[1, 2]]).repeat(num_rows, 1)
    is_certain = torch.ones(num_rows, 2, dtype=torch.bool)
    draft_probs = None
    if kind == "some drawn":
        # in every second row the first draft; the second one is never reached there
        is_certain[::2, 0] = False
        draft_probs = torch.tensor([0.7, 0.1, 0.1, 0.1]).repeat(num_rows, 1, 1)
        draft_ids[::2, 0] = torch.multinomial(draft_probs[::2, 0], 1).squeeze(-1)
    num_verified = torch.where(is_certain[:, 0], 2, 1)
    num_accepted, bonus = verify(draft_ids, draft_probs, target_probs.repeat(num_rows, 3, 1), num_verified, is_certain)
    first = torch.where(num_accepted > 0, draft_ids[:, 0], bonus)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        assert p_value(first[rows, None], target_probs.double()) > SMALLEST_P_VALUE
    second = torch.where(num_accepted > 1, draft_ids[:, 1], bonus)[1::2][num_accepted[1::2] > 0]
    assert p_value(second[:, None], target_probs.double()) > SMALLEST_P_VALUE
