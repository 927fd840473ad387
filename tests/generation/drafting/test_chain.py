"""The sequential part of drafting: what is drawn among few tokens follows the same law as among all.

B batch, K drafts, V vocab, n proposable tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from dspark_hf import DSparkAssistantModel, DSparkConfig
from dspark_hf.generation.drafting.chain import sample_block
from dspark_hf.generation.drawing import draw
from dspark_hf.modeling.heads import DEFAULT_MARKOV_TOP_K, LARGE_HEAD, build_markov_head
from tests.generation.frequencies import PROMPT, small_target, smallest_p_value, untrained_drafter
from tests.reference.sampling import SMALLEST_P_VALUE, p_value, text_probabilities
from tests.thinning import slow
from tests.tiny import tiny_target

NUM_SAMPLES = 2000
NEW_TOKENS = 5
BATCH_SIZE, BLOCK, VOCAB, WIDTH = 3, 4, 40, 8


def _head(kind: str, **fields: Any) -> Any:
    config = DSparkConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_attention_heads=2, markov_rank=4, markov_head_type=kind, **fields
    )
    head = build_markov_head(config)
    assert head is not None
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("is_reduced", [False, True])
def test_the_head_corrects_the_best_tokens_alone(kind: str, is_reduced: bool) -> None:
    """With `markov_top_k` a slot's logits are not the full head's at its best base logits, or others are proposed."""
    ids = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37]) if is_reduced else None
    size = VOCAB if ids is None else len(ids)
    head = _head(kind, draft_vocab_size=None if ids is None else size)
    base, states = torch.randn(BATCH_SIZE, BLOCK, size), torch.randn(BATCH_SIZE, BLOCK, WIDTH)
    anchors, top = torch.tensor([5, 2, 37]), 6
    shown: list[Tensor] = []

    def sampler(slot: int, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        shown.append(logits)
        return logits.argmax(-1), logits.softmax(-1)

    drafts, probs, previous = sample_block(
        base, states, anchors, sampler, markov_head=head, vocab_size=VOCAB, proposable_ids=ids, markov_top_k=top
    )
    assert probs is not None and probs.shape == (BATCH_SIZE, BLOCK, VOCAB)
    # slot by slot, row by row, from Eq. 4 and 5
    latents = head.latents(previous, states)
    for row in range(BATCH_SIZE):
        for slot in range(BLOCK):
            bias = head.markov_w2.weight @ latents[row, slot]
            expected = torch.full((VOCAB,), -torch.inf)
            for place in sorted(range(size), key=lambda p: -float(base[row, slot, p]))[:top]:
                token = place if ids is None else int(ids[place])
                expected[token] = base[row, slot, place] + bias[place]
            torch.testing.assert_close(shown[slot][row], expected, atol=1e-4, rtol=1e-4)
            assert drafts[row, slot] == expected.argmax()
            torch.testing.assert_close(probs[row, slot], expected.softmax(-1), atol=1e-4, rtol=1e-4)
            assert previous[row, slot] == (anchors[row] if slot == 0 else drafts[row, slot - 1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_wide_enough_choice_changes_nothing(kind: str) -> None:
    """Greedy drafts differ from the full head's although its best token is among those that are corrected."""
    head = _head(kind)
    # no correction outweighs what lies between the six best base logits and the others
    base = torch.randn(BATCH_SIZE, BLOCK, VOCAB)
    best = base.topk(6).indices
    base.scatter_add_(-1, best, torch.full(best.shape, 100.0))
    states, anchors = torch.randn(BATCH_SIZE, BLOCK, WIDTH), torch.tensor([5, 2, 37])
    blocks = [
        sample_block(
            base,
            states,
            anchors,
            lambda slot, logits, drafted: (logits.argmax(-1), None),
            markov_head=head,
            vocab_size=VOCAB,
            markov_top_k=top,
        )[0]
        for top in (None, 6, 12, VOCAB)
    ]
    for block in blocks[1:]:
        assert torch.equal(block, blocks[0])


@pytest.mark.parametrize(
    ("sampling", "kind"),
    [("block", "rnn"), ("invariant", "gated")]
    + [slow("block", "vanilla"), slow("block", "gated"), slow("invariant", "vanilla"), slow("invariant", "rnn")],
)
def test_sampled_text_follows_the_target(sampling: str, kind: str) -> None:
    """Sampled text is not the target's if the Markov head corrects the best tokens alone."""
    target = small_target()
    fields = {"markov_head_type": kind, "markov_top_k": 2, "draft_token_ids": [0, 1, 3, 5]}
    drafter = untrained_drafter(target, **fields)
    samples = target.generate(
        PROMPT.expand(NUM_SAMPLES, -1),
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        sampling=sampling,
        assistant_model=drafter,
    )[:, len(PROMPT) :]
    statistics = drafter.last_statistics
    assert statistics is not None and 0.1 < statistics.num_accepted / statistics.num_verified < 0.9
    assert smallest_p_value(samples, text_probabilities(target, PROMPT, NEW_TOKENS)) > SMALLEST_P_VALUE


def test_few_of_many_tokens_follow_the_target() -> None:
    """Sampled text is not the target's where a top-k leaves fewer tokens than can be proposed."""
    target = small_target()
    drafter = untrained_drafter(target, draft_token_ids=[0, 1, 2, 4, 5], markov_top_k=4)
    samples = target.generate(
        PROMPT.expand(NUM_SAMPLES, -1),
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        top_k=3,
        temperature=0.8,
        assistant_model=drafter,
    )[:, len(PROMPT) :]
    chain = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(3)])
    probabilities = text_probabilities(target, PROMPT, NEW_TOKENS, processors=chain)
    assert smallest_p_value(samples, probabilities) > SMALLEST_P_VALUE


def test_the_choice_is_saved_with_the_drafter(tmp_path: Any) -> None:
    """A drafter forgets how many tokens its Markov head is to correct, or takes a number that cannot be."""
    target = tiny_target("llama")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4, markov_top_k=16)
    drafter.save_pretrained(tmp_path)
    loaded = DSparkAssistantModel.from_pretrained(tmp_path)
    assert loaded.markov_top_k == loaded.config.markov_top_k == 16
    assert DSparkAssistantModel.from_pretrained(tmp_path, markov_top_k=0).markov_top_k is None
    with pytest.raises(ValueError, match="`markov_top_k` must be an integer in"):
        DSparkAssistantModel.from_target(target, markov_top_k=-1)


@pytest.mark.parametrize(("size", "expected"), [(LARGE_HEAD, None), (LARGE_HEAD + 1, DEFAULT_MARKOV_TOP_K)])
def test_large_heads_correct_the_best_alone_by_default(size: int, expected: int | None) -> None:
    """The head over a large vocabulary is applied to all of it, or a small one loses proposals."""
    with torch.device("meta"):
        config = DSparkConfig(vocab_size=size, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
        assert DSparkAssistantModel(config).markov_top_k == expected


def test_drawn_tokens_follow_their_weights() -> None:
    """Tokens are drawn with other chances than their weights give, or one that has none."""
    count = 40_000
    weights = torch.tensor([0.0, 3.0, 0.0, 1e-3, 2.0, 0.5, 0.0])
    drawn = draw(weights.expand(count, -1))
    assert p_value(drawn[:, None], (weights / weights.sum()).double()) > SMALLEST_P_VALUE
    # the negative control: weights that are nearly these
    assert p_value(drawn[:, None], torch.tensor([0.0, 3.0, 0.0, 1e-3, 2.0, 0.6, 0.0]).double() / 5.601) < 1e-6


@pytest.mark.parametrize("weights", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_no_distribution_is_an_error(weights: list[float]) -> None:
    """A token is drawn from what is no distribution, and nobody is told."""
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        draw(torch.tensor([[0.5, 0.5], weights]))
