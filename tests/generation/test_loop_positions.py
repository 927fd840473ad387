"""What the drafter is told: hidden states and anchors reach it at the positions of a per-token oracle.

A drafter that is told positions one off writes the right text with fewer accepted drafts, so that no comparison of
texts would notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_hf.generation.drafting.interface import DraftContext, DraftedBlock, Sampler
from dspark_hf.generation.requests.request import Request
from dspark_hf.generation.requests.stream import generate_stream
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.generation.schedulers import EveryThirdRound
from tests.thinning import slow
from tests.tiny import tiny_target


@dataclass
class Told:
    """What the drafter was told of one text."""

    # hidden state by token, and the position that came with it
    states: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    # anchor, its position, and how many tokens had been read
    anchors: list[tuple[int, int, int]] = field(default_factory=list)


class _Recording(DraftContext):
    """Write down what is told of every row, and draft as the context inside does."""

    def __init__(self, context: Any, texts: list[Told]):
        self.context = context
        self.texts = texts

    def extend(self, hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int]) -> None:
        for row, (told, count) in enumerate(zip(self.texts, num_tokens, strict=True)):
            told.states += hidden_states[row, :count]
            told.positions += positions[row, :count].tolist()

    def draft(self, anchor_ids: Tensor, positions: Tensor, num_drafts: int, sampler: Sampler) -> DraftedBlock:
        for told, anchor, position in zip(self.texts, anchor_ids.tolist(), positions.tolist(), strict=True):
            told.anchors.append((anchor, position, len(told.states)))
        return self.context.draft(anchor_ids, positions, num_drafts, sampler)

    def select_rows(self, rows: Tensor) -> None:
        self.context.select_rows(rows)
        self.texts = [self.texts[row] for row in rows.tolist()]

    def append_rows(self, other: _Recording) -> None:
        self.context.append_rows(other.context)
        self.texts = self.texts + other.texts


class RecordingDrafter(ScriptedDrafter):
    """A drafter with a script whose contexts write down what they are told, `texts` in the order of their start."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.texts: list[Told] = []

    def start(self, target, batch_size):
        context: Any = super().start(target, batch_size)
        # requests start one by one
        context.rows = [row + len(self.texts) for row in context.rows]
        new = [Told() for _ in range(batch_size)]
        self.texts += new
        return _Recording(context, new)


def _check(told: Told, text: list[int], target: Any) -> None:
    """Compare with an oracle that reads `text`, without padding, token by token."""
    # nothing behind the last anchor need be read
    assert len(told.positions) < len(text)
    assert told.positions == list(range(len(told.positions)))
    with torch.no_grad():
        for position, state in enumerate(told.states):
            read = target(torch.tensor([text[: position + 1]]), output_hidden_states=True)
            torch.testing.assert_close(state, read.hidden_states[1][0, -1], atol=1e-4, rtol=1e-4)
    assert told.anchors
    for anchor, position, num_read in told.anchors:
        # all that precedes the anchor has been read
        assert position == num_read
        assert anchor == text[position]


@pytest.mark.parametrize(
    ("lengths", "scheduler"),
    [((7,), "fixed"), ((9, 4, 17), EveryThirdRound()), slow((7,), EveryThirdRound()), slow((9, 4, 17), "fixed")]
    + [slow(lengths, scheduler) for lengths in ((7, 7), (7, 11)) for scheduler in ("fixed", EveryThirdRound())],
    ids=lambda value: "some rounds parked" if isinstance(value, EveryThirdRound) else str(value),
)
def test_positions_are_those_of_the_tokens(lengths, scheduler):
    """The drafter is told wrong positions, reads rejected drafts, or reads too late."""
    target = tiny_target("llama")
    inputs = ragged_prompts(len(lengths), lengths=lengths)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**inputs, **options)
    # rows leave at different times
    options["eos_token_id"] = sorted({int(plain[row, -17 + 5 * row]) for row in range(1, len(lengths))}) or None
    plain = target.generate(**inputs, **options)
    padding = num_padded(inputs)
    drafter = RecordingDrafter(target, plain, padding, 0.7)
    assisted = target.generate(**inputs, **options, assistant_model=drafter, scheduler=scheduler)
    assert torch.equal(assisted, plain)
    assert len(drafter.texts) == len(lengths)
    for told, row, num_pads in zip(drafter.texts, plain.tolist(), padding, strict=True):
        _check(told, row[num_pads:], target)


def test_one_padded_row():
    """Padding of a single row is counted among its positions."""
    target = tiny_target("llama")
    inputs = {name: tensor[1:] for name, tensor in ragged_prompts(2, lengths=(11, 6)).items()}
    plain = target.generate(**inputs, max_new_tokens=24, do_sample=False)
    drafter = RecordingDrafter(target, plain, [5], 0.7)
    target.generate(**inputs, max_new_tokens=24, do_sample=False, assistant_model=drafter)
    _check(drafter.texts[0], plain[0, 5:].tolist(), target)


@pytest.mark.parametrize("scheduler", [slow("fixed"), EveryThirdRound()], ids=["every round", "some rounds parked"])
def test_positions_of_requests(scheduler):
    """Rows that join a running batch are taken to stand where others do."""
    target = tiny_target("llama")
    requests = [
        Request(torch.arange(2, 2 + length), {"max_new_tokens": count, "do_sample": False}, key)
        for key, (length, count) in enumerate([(5, 20), (11, 6), (3, 14), (8, 17)])
    ]
    texts = [target.generate(one.input_ids[None], **one.options)[0] for one in requests]
    script = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    drafter = RecordingDrafter(target, script, [0] * len(texts), 0.7)
    assert len(list(generate_stream(target, requests, drafter=drafter, max_rows=2, scheduler=scheduler))) == 4
    for told, text in zip(drafter.texts, texts, strict=True):
        _check(told, text.tolist(), target)
