"""The tree that a drafter grows holds the most probable paths of its block, each behind the one that it continues."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_hf.generation.drafting.branching import grow_tree
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.heads import build_markov_head
from tests.closeness import assert_same_up_to_rounding

VOCAB_SIZE, NUM_SLOTS, HIDDEN_SIZE = 5, 3, 8


def _head(kind: str | None) -> Any:
    if kind is None:
        return None
    config = DSparkConfig(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, markov_rank=4, markov_head_type=kind, mask_token_id=0
    )
    head = build_markov_head(config)
    assert head is not None
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def _chance(base: Tensor, hidden: Tensor, anchor: int, head: Any, path: tuple[int, ...]) -> float:
    """Return the log-probability of a path by the equations, token by token."""
    total, previous = 0.0, anchor
    state = None if head is None else head.initial_state(hidden[:, 0])
    for slot, token in enumerate(path):
        logits = base[0, slot].double()
        if head is not None:
            latent, state = head.step(torch.tensor([previous]), hidden[:, slot], state)
            logits = logits + head.project(latent)[0].double()
        total += float(logits.log_softmax(-1)[token])
        previous = token
    return total


def _paths(token_ids: Tensor, parents: Tensor) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(token_ids[0].tolist(), parents[1:].tolist(), strict=True):
        # a parent that comes later raises
        paths.append((*paths[parent], token))
    return paths[1:]


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", None])
@pytest.mark.parametrize("num_drafts", [1, 7, 40, 400])
@torch.no_grad()
def test_a_tree_holds_the_most_probable_paths(kind, num_drafts):
    """A path is left out for a less probable one, or its token was not conditioned on its own parent."""
    torch.manual_seed(num_drafts)
    base, hidden = 2 * torch.randn(1, NUM_SLOTS, VOCAB_SIZE), torch.randn(1, NUM_SLOTS, HIDDEN_SIZE)
    head, anchor = _head(kind), 2
    token_ids, parents, log_probs = grow_tree(base, hidden, torch.tensor([anchor]), num_drafts, markov_head=head)
    every = [path for length in range(1, NUM_SLOTS + 1) for path in product(range(VOCAB_SIZE), repeat=length)]
    chances = {path: _chance(base, hidden, anchor, head, path) for path in every}
    expected = sorted(every, key=lambda path: -chances[path])[:num_drafts]
    assert parents[0] == -1
    assert _paths(token_ids, parents) == expected
    assert_same_up_to_rounding(log_probs, torch.tensor([chances[path] for path in expected]))


@torch.no_grad()
def test_few_tokens_can_be_proposed():
    """Of a reduced vocabulary places are taken for ids, or with a top-k tokens are drafted that the head never saw."""
    torch.manual_seed(0)
    base, hidden = torch.randn(1, NUM_SLOTS, VOCAB_SIZE), torch.randn(1, NUM_SLOTS, HIDDEN_SIZE)
    head, ids = _head("vanilla"), torch.tensor([0, 1, 2, 3, 4])
    options = {"markov_head": head, "markov_top_k": 2}
    token_ids, parents, log_probs = grow_tree(base, hidden, torch.tensor([1]), 9, **options)
    best = base[0].topk(2).indices
    paths = _paths(token_ids, parents)
    assert all(token in best[slot] for path in paths for slot, token in enumerate(path))
    assert (log_probs[:-1] >= log_probs[1:]).all()
    # what the drafter calls token 0 is another one, which the head knows by that id
    same, _, _ = grow_tree(base, hidden, torch.tensor([1]), 9, proposable_ids=ids, **options)
    assert torch.equal(same, token_ids)
    first, _, _ = grow_tree(base[:, :1], hidden, torch.tensor([1]), 2, proposable_ids=ids + 7, **options)
    assert first[0].tolist() == [token + 7 for token in token_ids[0, parents[1:] == 0][:2].tolist()]


@torch.no_grad()
def test_logits_that_are_no_numbers():
    """Overflowing weights of a drafter end in an error, or in drafts without a parent."""
    base = torch.full((1, NUM_SLOTS, VOCAB_SIZE), float("nan"))
    base[0, 1] = float("inf")
    token_ids, parents, _ = grow_tree(base, torch.zeros(1, NUM_SLOTS, 2), torch.tensor([1]), 6, markov_head=None)
    assert len(_paths(token_ids, parents)) == 6
    assert int(token_ids.min()) >= 0
    assert int(token_ids.max()) < VOCAB_SIZE
