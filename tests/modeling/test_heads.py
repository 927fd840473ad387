"""Markov and confidence heads, over whole blocks and slot by slot."""

from __future__ import annotations

import pytest
import torch

from dspark_hf import DSparkConfig
from dspark_hf.modeling.heads import ConfidenceHead, MarkovHead, build_markov_head

RANK = 6


def _head(kind: str, **fields: object) -> MarkovHead:
    config = DSparkConfig(
        vocab_size=40, hidden_size=32, num_attention_heads=4, markov_rank=RANK, markov_head_type=kind, **fields
    )
    head = build_markov_head(config)
    assert head is not None
    return head


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_whole_blocks_equal_single_steps(kind: str) -> None:
    """Training would teach the head another recurrence than drafting runs."""
    head = _head(kind)
    previous, hidden = torch.randint(40, (2, 3, 5)), torch.randn(2, 3, 5, 32)
    latents = head.latents(previous, hidden)
    assert latents.shape == (2, 3, 5, RANK)
    for row in range(2):
        for block in range(3):
            state = head.initial_state(hidden[row, block, :1])
            for k in range(5):
                latent, state = head.step(previous[row, block, k : k + 1], hidden[row, block, k : k + 1], state)
                torch.testing.assert_close(latent[0], latents[row, block, k])


def test_only_the_rnn_remembers() -> None:
    """A memoryless head would see further back than the previous token, or the RNN would not."""
    hidden, previous = torch.randn(1, 5, 32), torch.randint(40, (1, 5))
    other = previous.clone()
    other[0, 0] = (other[0, 0] + 1) % 40
    for kind, remembers in (("vanilla", False), ("gated", False), ("rnn", True)):
        head = _head(kind)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.normal_()
        change = (head.latents(previous, hidden) - head.latents(other, hidden)).abs().amax(-1)[0]
        assert change[0] > 0
        assert (change[1:] > 0).any() == remembers


def test_reduced_vocabulary_has_fewer_biases() -> None:
    """The bias would not fit the logits of a drafter that proposes few tokens."""
    head = _head("vanilla", draft_vocab_size=10)
    assert head.project(head.embed(torch.tensor([39]))).shape == (1, 10)


def test_no_rank_is_no_head() -> None:
    """A plain DFlash drafter would get a Markov head of width zero."""
    config = DSparkConfig(vocab_size=40, hidden_size=32, num_attention_heads=4, markov_rank=0)
    assert build_markov_head(config) is None


@pytest.mark.parametrize(("with_markov", "width"), [(True, 32 + RANK), (False, 32)])
def test_confidence_is_fp32(with_markov: bool, width: int) -> None:
    """A bf16 drafter would round its confidence before the schedule compares it."""
    config = DSparkConfig(
        hidden_size=32, num_attention_heads=4, markov_rank=RANK, confidence_head_with_markov=with_markov
    )
    head = ConfidenceHead(config).to(torch.bfloat16)
    logits = head(torch.randn(2, 5, width, dtype=torch.bfloat16))
    assert logits.shape == (2, 5)
    assert logits.dtype == torch.float32
