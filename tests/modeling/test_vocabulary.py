"""A target whose vocabulary was grown or padded after its drafter was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.modeling.vocabulary import resized_rows
from tests.generation.prompts import ragged_prompts
from tests.thinning import mostly_slow
from tests.tiny import VOCAB_SIZE, tiny_target

GROWN = 72
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "none": {"markov_rank": 0},
    "rnn": {"markov_head_type": "rnn"},
    "reduced": {"draft_token_ids": range(0, VOCAB_SIZE, 3)},
    "reduced, Markov too": {"draft_token_ids": range(0, VOCAB_SIZE, 3), "markov_over_draft_vocab": True},
    # as many proposable tokens as there are rows in other tables
    "all but one": {"draft_token_ids": range(1, VOCAB_SIZE)},
    "own embeddings": {"owns_embeddings": True},
    "own embeddings, reduced": {"owns_embeddings": True, "draft_token_ids": range(0, VOCAB_SIZE, 3)},
}


def _drafter(target: Any, **fields: Any) -> DSparkAssistantModel:
    options = {"num_hidden_layers": 1, "block_size": 4, "markov_rank": 6, "initializer_range": 0.3}
    return DSparkAssistantModel.from_target(target, **{**options, **fields})


@pytest.mark.parametrize("kind", mostly_slow(KINDS, ("rnn", "reduced, Markov too", "own embeddings, reduced")))
def test_drafter_follows_its_target(kind: str, tmp_path: Path) -> None:
    """A drafter cannot be fitted to a grown target, drafts what does not exist, or forgets what it has learnt."""
    target = tiny_target()
    drafter = _drafter(target, **KINDS[kind])
    before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    inputs, options = ragged_prompts(3), {"max_new_tokens": 16, "do_sample": False}
    target.resize_token_embeddings(GROWN)
    with pytest.raises(ValueError, match=r"`vocab_size` 72, got 64.*drafter\.resize_token_embeddings\(72\)"):
        target.generate(**inputs, **options, assistant_model=drafter)
    drafter.resize_token_embeddings(GROWN)
    # what was learnt is still there
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor[: len(before[name])], before[name])
    # it is the drafter that a folder holds
    drafter.save_pretrained(tmp_path)
    drafter = DSparkAssistantModel.from_pretrained(tmp_path)
    fresh = _drafter(target, **KINDS[kind])
    assert {name: x.shape for name, x in drafter.state_dict().items()} == {
        name: x.shape for name, x in fresh.state_dict().items()
    }
    plain = target.generate(**inputs, **options)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter, scheduler="fixed"), plain)


def test_new_tokens_are_average_ones() -> None:
    """A new token gets a transition bias that favours or forbids it."""
    drafter = _drafter(tiny_target())
    weights = [drafter.markov_head.markov_w1.weight.clone(), drafter.markov_head.markov_w2.weight.clone()]
    drafter.resize_token_embeddings(70, pad_to_multiple_of=8)
    assert drafter.config.vocab_size == drafter.markov_head.markov_w1.num_embeddings == GROWN
    for module, old in zip((drafter.markov_head.markov_w1, drafter.markov_head.markov_w2), weights, strict=True):
        torch.testing.assert_close(module.weight[VOCAB_SIZE:], old.mean(0).expand(8, -1))


def test_tokens_that_are_needed_stay() -> None:
    """A smaller vocabulary lacks the mask, or a token that is proposed."""
    drafter = _drafter(tiny_target(), draft_token_ids=[3, 50])
    with pytest.raises(ValueError, match="`new_num_tokens` must be more than 50"):
        drafter.resize_token_embeddings(50)
    drafter.resize_token_embeddings(51)
    assert drafter.draft_token_ids.tolist() == [3, 50]
    assert drafter.t2d.nonzero().flatten().tolist() == [3, 50]
    assert torch.equal(resized_rows(torch.arange(4.0)[:, None], 2), torch.tensor([[0.0], [1.0]]))
