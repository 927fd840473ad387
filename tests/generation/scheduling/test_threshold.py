"""A fixed number of drafts, and blocks cut at the first doubtful draft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.drafting.interface import DraftedBlock
from dspark_hf.generation.scheduling import Batch, CallInfo, FixedScheduler, ThresholdScheduler
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.generation.altered import AlteredDrafter
from tests.generation.drafters import BLOCK_SIZE, ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.thinning import slow
from tests.tiny import tiny_target

NEW_TOKENS = 16


@contextmanager
def _recorded_widths(target: PreTrainedModel) -> Iterator[list[int]]:
    """Give the number of token positions of every pass through the target's first decoder layer."""
    widths: list[int] = []

    def record(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        widths.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    handle = TargetAdapter(target).layers[0].register_forward_pre_hook(record, with_kwargs=True)
    yield widths
    handle.remove()


def _greedy(target: PreTrainedModel, inputs: dict[str, Tensor], **options: object) -> Tensor:
    return target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)


def _confident(drafter: ScriptedDrafter, confidence: list[list[float]]) -> AlteredDrafter:
    """Return `drafter` with the same confidences, one list per row, in every round."""
    table = torch.tensor(confidence)

    def alter(block: DraftedBlock) -> DraftedBlock:
        return replace(block, confidence=table[:, : block.token_ids.shape[1]])

    return AlteredDrafter(drafter, alter)


def _untrained(target: PreTrainedModel, **fields: object) -> DSparkAssistantModel:
    # larger weights than fresh ones, so that confidences lie on both sides of a half
    options = {"num_hidden_layers": 1, "markov_rank": 8, "block_size": BLOCK_SIZE, "initializer_range": 0.5}
    return DSparkAssistantModel.from_target(target, **{**options, **fields})


def _call(drafter: DSparkAssistantModel | None = None) -> CallInfo:
    target = tiny_target()
    return CallInfo(TargetAdapter(target), drafter or _untrained(target), 1, BLOCK_SIZE)


def _block(confidence: Tensor | None, num_rows: int = 1, num_drafts: int = BLOCK_SIZE) -> DraftedBlock:
    shape = (num_rows, num_drafts) if confidence is None else confidence.shape
    return DraftedBlock(torch.zeros(shape, dtype=torch.long), None, confidence)


def _admitted(threshold: float, confidence: Tensor) -> list[int]:
    num_rows, num_drafts = confidence.shape
    schedule = ThresholdScheduler(threshold, confidence="head").start(_call())
    return schedule.admit(_block(confidence), Batch((num_drafts,) * num_rows, num_rows))


def test_fixed_scheduler_admits_every_draft():
    """Drafts are thrown away although nobody asked for it, or a row gets more than it has room for."""
    schedule = FixedScheduler().start(_call())
    batch = Batch((4, 4, 2), 3)
    assert schedule.num_drafts(batch) == 4
    assert schedule.admit(_block(None, 3, 4), batch) == [4, 4, 2]
    assert schedule.admit(_block(torch.zeros(3, 4)), batch) == [4, 4, 2]


def test_threshold_cuts_at_the_first_doubtful_draft():
    """A draft behind a doubtful one is verified, or a draft at the threshold is not."""
    confidence = torch.tensor(
        [[0.9, 0.5, 0.6], [0.9, 0.4, 0.9], [0.1, 0.9, 0.9], [0.5, 0.5, 0.49]],
    )
    assert _admitted(0.5, confidence) == [3, 1, 0, 2]


def test_threshold_decides_from_earlier_confidences_only():
    """What comes after a draft decides whether it is verified: sampling is no longer lossless."""
    confidence = torch.rand(64, BLOCK_SIZE)
    admitted = torch.tensor(_admitted(0.4, confidence))
    for slot in range(BLOCK_SIZE):
        changed = confidence.clone()
        changed[:, slot + 1 :] = torch.rand(64, BLOCK_SIZE - slot - 1)
        again = torch.tensor(_admitted(0.4, changed))
        assert torch.equal(again > slot, admitted > slot)


def test_rows_are_scheduled_one_by_one():
    """A row's block is cut because of another row."""
    confidence = torch.rand(16, BLOCK_SIZE)
    assert _admitted(0.4, confidence) == [_admitted(0.4, row[None])[0] for row in confidence]


@pytest.mark.parametrize(
    ("confidence", "widths"),
    [
        ([0.9, 0.9, 0.9, 0.9, 0.9], [6, 6, 3]),
        ([0.9, 0.8, 0.3, 0.9, 0.9], [3, 3, 3, 3, 3]),
        ([0.2, 0.9, 0.9, 0.9, 0.9], [1] * (NEW_TOKENS - 1)),
    ],
)
def test_threshold_narrows_the_verify_pass(confidence, widths):
    """The target is run over drafts that the threshold has already given up."""
    target = tiny_target()
    inputs = ragged_prompts(1)
    plain = _greedy(target, inputs)
    drafter = _confident(ScriptedDrafter(target, plain, num_padded(inputs), 1.0), [confidence])
    with _recorded_widths(target) as recorded:
        assisted = _greedy(target, inputs, assistant_model=drafter, assistant_confidence_threshold=0.5)
    assert torch.equal(assisted, plain)
    assert recorded == [inputs["input_ids"].shape[1], *widths]
    assert drafter.last_statistics.num_verified == sum(widths) - len(widths)


def test_a_batch_is_as_wide_as_its_most_confident_row():
    """A batch is verified at full width although every row's block was cut, or a row's cut is not its own."""
    target = tiny_target()
    inputs = ragged_prompts(3)
    plain = _greedy(target, inputs)
    confidence = [[0.9, 0.1, 0.9, 0.9, 0.9], [0.1, 0.9, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.2, 0.9]]
    drafter = _confident(ScriptedDrafter(target, plain, num_padded(inputs), 1.0), confidence)
    with _recorded_widths(target) as recorded:
        assisted = _greedy(target, inputs, assistant_model=drafter, assistant_confidence_threshold=0.5)
    assert torch.equal(assisted, plain)
    # after the prefill 15 tokens are missing: the last row needs 4 rounds of 4, and has room for 2 drafts in the last;
    # the first row writes 2 tokens a round, the second 1
    assert recorded[1:6] == [4, 4, 4, 3, 2]
    assert set(recorded[6:]) <= {1, 2}
    origins = drafter.last_statistics.origins
    assert [sum(row) for row in origins] == [7, 0, 11]


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("num_drafts", [1, 3])
def test_num_assistant_tokens_caps_the_drafts(num_drafts, num_rows):
    """More drafts are verified per round than the user allows."""
    target = tiny_target()
    inputs = ragged_prompts(num_rows)
    plain = _greedy(target, inputs)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 1.0)
    with _recorded_widths(target) as recorded:
        assisted = _greedy(target, inputs, assistant_model=drafter, num_assistant_tokens=num_drafts)
    assert torch.equal(assisted, plain)
    assert max(recorded[1:]) == 1 + num_drafts
    assert len(recorded) == 1 + -(-(NEW_TOKENS - 1) // (1 + num_drafts))


@pytest.mark.parametrize(
    ("markov_head_type", "num_rows"),
    [("vanilla", 1), ("rnn", 4), slow("vanilla", 4), slow("rnn", 1), slow("gated", 1), slow("gated", 4)],
)
def test_threshold_with_a_confidence_head(markov_head_type, num_rows):
    """A threshold changes greedy text, or a confidence head never cuts a block."""
    target = tiny_target()
    inputs = ragged_prompts(num_rows)
    drafter = _untrained(target, markov_head_type=markov_head_type)
    plain = _greedy(target, inputs)
    assisted = _greedy(target, inputs, assistant_model=drafter, assistant_confidence_threshold=0.5)
    assert torch.equal(assisted, plain)
    assert 0 < drafter.last_statistics.num_verified < drafter.last_statistics.num_drafted


@pytest.mark.parametrize("markov_head_type", ["vanilla", "gated", "rnn"])
def test_confidence_does_not_depend_on_its_own_draft(markov_head_type):
    """A draft decides about its own verification: sampling is no longer lossless."""
    target = tiny_target()
    drafter = _untrained(target, markov_head_type=markov_head_type)
    adapter = TargetAdapter(target, drafter.target_layer_ids)
    ids = ragged_prompts(1)["input_ids"]
    with adapter, torch.no_grad():
        target(ids)
        states = adapter.pop_context_hidden_states()
        context = drafter.start(adapter, 1)
        context.extend(states, torch.arange(ids.shape[1])[None], [ids.shape[1]])

        def confidence(changed_slot: int | None) -> Tensor:
            def sampler(slot: int, logits: Tensor, drafted: Tensor) -> tuple[Tensor, None]:
                return torch.tensor([7 if slot == changed_slot else 5]), None

            block = context.draft(torch.tensor([3]), torch.tensor([ids.shape[1]]), BLOCK_SIZE, sampler)
            assert block.confidence is not None
            return block.confidence[0]

        reference = confidence(None)
        for slot in range(BLOCK_SIZE):
            changed = confidence(slot)
            assert torch.equal(changed[: slot + 1], reference[: slot + 1])
            # it does depend on the draft before
            assert slot + 1 == BLOCK_SIZE or changed[slot + 1] != reference[slot + 1]


@pytest.mark.parametrize("num_rows", [1, 2])
def test_threshold_needs_a_confidence_head(num_rows):
    """A threshold is silently ignored by a drafter that cannot estimate its confidence."""
    target = tiny_target()
    drafter = _untrained(target, enable_confidence_head=False)
    with pytest.raises(ValueError, match="confidence head"):
        target.generate(
            **ragged_prompts(num_rows), max_new_tokens=4, assistant_model=drafter, assistant_confidence_threshold=0.5
        )
