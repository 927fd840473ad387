"""The training pass and the drafting path are one model."""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.backbone import BlockAttention
from tests.closeness import assert_same_up_to_rounding
from tests.modeling.drafting import draft_greedily
from tests.thinning import slow
from tests.tiny import tiny_target

# every head and every backbone
QUICK = (("vanilla", "gemma3"), ("gated", "gemma4"), ("rnn", "qwen3"), ("rnn", "gemma4"), ("dflash", "qwen3"))
NUM_TOKENS = 12
BLOCK_SIZE = 4
LAYER_IDS = [0, 1]


def _pair(head: str, **overrides: Any) -> tuple[DSparkAssistantModel, TargetAdapter]:
    target = tiny_target("qwen3")
    rank = 0 if head == "dflash" else 6
    drafter = DSparkAssistantModel.from_target(
        target,
        num_hidden_layers=2,
        block_size=BLOCK_SIZE,
        markov_rank=rank,
        markov_head_type="vanilla" if head == "dflash" else head,
        target_layer_ids=LAYER_IDS,
        initializer_range=0.3,
        mask_token_id=63,
        **overrides,
    )
    return drafter, TargetAdapter(target, LAYER_IDS)


def _sequence() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(2, 60, (2, NUM_TOKENS + BLOCK_SIZE)), torch.randn(2, NUM_TOKENS, len(LAYER_IDS) * 32)


def _previous(ids: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    places = anchors[..., None] + torch.arange(BLOCK_SIZE)
    return ids.gather(1, places.flatten(1)).view_as(places)


@pytest.mark.parametrize(
    ("head", "backbone"),
    [
        (pytest.param if case in QUICK else slow)(*case)
        for case in product(("vanilla", "gated", "rnn", "dflash"), ("qwen3", "gemma3", "gemma4"))
    ],
)
def test_training_equals_drafting_block_by_block(head: str, backbone: str) -> None:
    """A drafter would be trained on blocks it never sees while drafting: another context, position or slot."""
    drafter, target = _pair(head, backbone_type=backbone)
    anchors = torch.tensor([[1, 4, 5, 11], [2, 3, 8, 10]])
    ids, context = _sequence()
    # drafting is greedy: teacher-force the training pass on the very drafts
    blocks = {}
    for row in range(2):
        for block, anchor in enumerate(anchors[row].tolist()):
            drafted = draft_greedily(
                drafter, target, context[row : row + 1, :anchor], [anchor], [int(ids[row, anchor])], chunk_size=3
            )
            blocks[row, block] = drafted
    previous = _previous(ids, anchors)
    for (row, block), drafted in blocks.items():
        previous[row, block, 1:] = drafted.token_ids[0, :-1]
    with torch.no_grad():
        output = drafter(context, ids.gather(1, anchors), anchors, previous, target)
        logits = target.head(output.hidden_states)
        if output.latents is not None:
            logits = logits + drafter.markov_head.project(output.latents)
    for (row, block), drafted in blocks.items():
        torch.testing.assert_close(logits[row, block], drafted.logits[0], atol=1e-4, rtol=0)
        confidence = output.confidence_logits[row, block].sigmoid()
        torch.testing.assert_close(confidence, drafted.confidence[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_a_single_block_sees_what_several_see(is_ragged: bool, is_causal: bool) -> None:
    """A row's one block, which goes through another kernel, would be drafted from other places of its context."""
    drafter, _ = _pair("dflash", num_attention_heads=4, num_key_value_heads=2)
    attention = BlockAttention(drafter.config, is_causal)
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    batch, size, length = 3, BLOCK_SIZE, 9
    states = torch.randn(batch, 2, size, drafter.config.hidden_size)
    rotary = drafter.rotary_emb(torch.arange(length, length + size).expand(batch, 2, -1), torch.float32)
    context = tuple(torch.randn(batch, 2, length, drafter.config.head_dim) for _ in range(2))
    mask = torch.arange(length) < torch.tensor([[[9]], [[4]], [[0]]]) if is_ragged else None
    with torch.no_grad():
        both = attention(states, rotary, context, None if mask is None else mask.expand(-1, 2, -1))
        first = attention(states[:, :1], tuple(part[:, :1] for part in rotary), context, mask)
    torch.testing.assert_close(first, both[:, :1], atol=1e-5, rtol=1e-4)


def test_blocks_do_not_see_each_other() -> None:
    """A block would peek at its neighbours or at the context from its anchor on: training would cheat."""
    drafter, target = _pair("vanilla")
    ids, context = _sequence()
    anchors = torch.tensor([[2, 6], [2, 6]])
    previous = _previous(ids, anchors)
    run = lambda states, anchor_ids: drafter(states, anchor_ids, anchors, previous, target).hidden_states  # noqa: E731
    with torch.no_grad():
        hidden = run(context, ids.gather(1, anchors))
        later = context.clone()
        later[:, 2:] += 1.0
        changed = run(later, ids.gather(1, anchors))
        assert_same_up_to_rounding(changed[:, 0], hidden[:, 0])
        assert (changed[:, 1] - hidden[:, 1]).abs().amax() > 0.1
        others = ids.gather(1, anchors)
        others[:, 1] = (others[:, 1] + 1) % 60
        changed = run(context, others)
        assert_same_up_to_rounding(changed[:, 0], hidden[:, 0])
        assert (changed[:, 1] - hidden[:, 1]).abs().amax() > 0.1


def test_an_anchor_without_context_drafts() -> None:
    """A conversation that starts with the model's own words would give NaN."""
    drafter, target = _pair("rnn")
    ids, context = _sequence()
    anchors = torch.zeros(2, 1, dtype=torch.long)
    for states in (context, context[:, :0]):
        output = drafter(states, ids[:, :1], anchors, _previous(ids, anchors), target)
        assert output.hidden_states.isfinite().all()


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_every_weight_learns(head: str) -> None:
    """Part of a drafter would stay at its random start."""
    drafter, target = _pair(head)
    output = _train_step(drafter, target)
    assert output.isfinite()
    assert [name for name, parameter in drafter.named_parameters() if not _has_gradient(parameter)] == []
    assert not any(_has_gradient(parameter) for parameter in target.model.parameters())


def _has_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)


def _train_step(drafter: DSparkAssistantModel, target: TargetAdapter) -> torch.Tensor:
    torch.manual_seed(1)
    ids, context = _sequence()
    anchors = torch.tensor([[1, 5], [2, 9]])
    output = drafter.train()(context, ids.gather(1, anchors), anchors, _previous(ids, anchors), target)
    bias = drafter.markov_head.project(output.latents)
    total = output.hidden_states.square().sum() + bias.square().sum() + output.confidence_logits.sum()
    total.backward()
    return total.detach()


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    """`gradient_checkpointing_enable` would fail, be ignored, or change the gradients."""
    plain, target = _pair("vanilla")
    checkpointed, _ = _pair("vanilla")
    checkpointed.load_state_dict(plain.state_dict())
    with warnings.catch_warnings():
        # transformers 5.24 renames it; 5.17 has the old name only
        warnings.simplefilter("ignore", FutureWarning)
        checkpointed.gradient_checkpointing_enable()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    checkpointed.layers[0].input_layernorm.register_forward_hook(count)
    assert_same_up_to_rounding(_train_step(checkpointed, target), _train_step(plain, target))
    # once forward, once more on the way back
    assert calls == 2
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_ragged_rows_equal_single_rows() -> None:
    """A shorter row of a batch would see another row's padding."""
    drafter, target = _pair("gated")
    context = torch.randn(3, 70, len(LAYER_IDS) * 32)
    lengths, anchors = [70, 5, 33], [7, 8, 9]
    together = draft_greedily(drafter, target, context, lengths, anchors, chunk_size=16)
    for row, length in enumerate(lengths):
        alone = draft_greedily(drafter, target, context[row : row + 1, :length], [length], [anchors[row]])
        assert torch.equal(together.token_ids[row], alone.token_ids[0])
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=0)


def test_selected_rows_keep_their_context() -> None:
    """Finished rows would leave the batch with another row's context."""
    drafter, target = _pair("vanilla")
    context = torch.randn(3, 8, len(LAYER_IDS) * 32)
    state = drafter.start(target, 3)
    state.extend(context, torch.arange(8).expand(3, -1), [8, 4, 6])
    state.select_rows(torch.tensor([2, 0]))
    block = state.draft(
        torch.tensor([9, 7]), torch.tensor([6, 8]), BLOCK_SIZE, lambda k, logits, so_far: (logits.argmax(-1), None)
    )
    for place, (row, length, anchor) in enumerate([(2, 6, 9), (0, 8, 7)]):
        alone = draft_greedily(drafter, target, context[row : row + 1, :length], [length], [anchor])
        assert torch.equal(block.token_ids[place], alone.token_ids[0])


def test_borrowed_parts_are_not_copied() -> None:
    """A drafter would hold or save a second copy of the target's embedding and head."""
    drafter, target = _pair("vanilla")
    vocabulary_sized = [name for name, x in drafter.state_dict().items() if 64 in x.shape]
    assert vocabulary_sized == [
        "fc.weight",
        "markov_head.markov_w1.weight",
        "markov_head.markov_w2.weight",
    ]
    before = draft_greedily(drafter, target, torch.zeros(1, 3, 64), [3], [5]).logits
    with torch.no_grad():
        target.model.get_output_embeddings().weight.mul_(2)
    after = draft_greedily(drafter, target, torch.zeros(1, 3, 64), [3], [5]).logits
    assert not torch.allclose(before, after)
