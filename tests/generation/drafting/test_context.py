"""Hidden states that wait for the drafter reach it as if it had read them at once.

B batch, T tokens, D hidden.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_hf.generation.drafting.context import DeferredContext
from dspark_hf.generation.drafting.interface import DraftContext, DraftedBlock, Sampler

NUM_ROWS = 3
# tokens of a row that may wait until they are read
MOST_WAITING = 128


class _Recorder(DraftContext):
    """Remember every row's hidden states and positions in the order in which they came."""

    def __init__(self, num_rows: int):
        self.rows: list[list[tuple[float, int]]] = [[] for _ in range(num_rows)]
        self.num_reads = 0

    def extend(self, hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int]) -> None:
        assert hidden_states.shape[:2] == positions.shape
        assert max(num_tokens) <= hidden_states.shape[1]
        self.num_reads += 1
        for row, count in enumerate(num_tokens):
            states = hidden_states[row, :count, 0].tolist()
            self.rows[row].extend(zip(states, positions[row, :count].tolist(), strict=True))

    def draft(self, anchor_ids: Tensor, positions: Tensor, num_drafts: int, sampler: Sampler) -> DraftedBlock:
        raise NotImplementedError

    def select_rows(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]


def _pass(num_rows: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.rand(num_rows, width, 4), torch.randint(0, 1000, (num_rows, width))


def _plain_pass(context: DeferredContext, counts: list[int]) -> None:
    context.extend(*_pass(len(counts), 1), counts)


def test_everything_arrives_in_order():
    """A state is lost, read twice, read late, or read at another row's position; whatever rows kept, or left."""
    draw = random.Random(0)
    for _ in range(60):
        at_once, late = _Recorder(NUM_ROWS), _Recorder(NUM_ROWS)
        deferred = DeferredContext(late)
        num_rows = NUM_ROWS
        for _ in range(30):
            width = draw.choice([1, 1, 1, 4])
            # in plain rounds every row keeps its token, or waits; of drafts it keeps some
            kept = [draw.choice([0, 1, 1, 1]) if width == 1 else draw.randint(0, width) for _ in range(num_rows)]
            states, positions = _pass(num_rows, width)
            at_once.extend(states, positions, kept)
            deferred.extend(states, positions, kept)
            if draw.random() < 0.1 and num_rows > 1:
                rows = torch.tensor(sorted(draw.sample(range(num_rows), num_rows - 1)))
                at_once.select_rows(rows)
                deferred.select_rows(rows)
                num_rows -= 1
            if draw.random() < 0.15:
                deferred.catch_up()
                assert late.rows == at_once.rows
        deferred.catch_up()
        assert late.rows == at_once.rows


def test_nothing_is_read_before_it_is_needed():
    """Rounds without drafts cost the drafter a pass each."""
    recorder = _Recorder(NUM_ROWS)
    context = DeferredContext(recorder)
    context.extend(*_pass(NUM_ROWS, 5), [5, 2, 4])
    for _ in range(50):
        _plain_pass(context, [1] * NUM_ROWS)
    assert recorder.num_reads == 0
    assert context.is_behind
    context.catch_up()
    # the prompt, and all plain rounds at once
    assert recorder.num_reads == 2
    assert not context.is_behind
    context.catch_up()
    assert recorder.num_reads == 2


def test_rows_that_wait_do_not_break_the_run():
    """One row that has ended makes every plain round a pass of its own."""
    recorder = _Recorder(NUM_ROWS)
    context = DeferredContext(recorder)
    for _ in range(50):
        _plain_pass(context, [1, 0, 1])
    context.catch_up()
    assert recorder.num_reads == 1
    assert [len(row) for row in recorder.rows] == [50, 0, 50]


def test_what_waits_is_bounded():
    """A long parked text keeps all its hidden states in memory."""
    recorder = _Recorder(1)
    context = DeferredContext(recorder)
    for number in range(1, 1000):
        _plain_pass(context, [1])
        assert number - len(recorder.rows[0]) < MOST_WAITING
    # and is not read token by token
    assert recorder.num_reads <= 1 + 1000 // MOST_WAITING


def test_being_behind():
    """A round that reads the prompt, or what plain rounds left, counts as an ordinary one, or the other way round."""
    context = DeferredContext(_Recorder(1))
    context.extend(*_pass(1, 10), [10])
    assert context.is_behind
    context.catch_up()
    for _ in range(3):
        context.extend(*_pass(1, 4), [2])
        assert not context.is_behind
        context.catch_up()
    _plain_pass(context, [1])
    assert not context.is_behind
    _plain_pass(context, [1])
    assert context.is_behind
