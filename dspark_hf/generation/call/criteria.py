"""Stopping criteria over several new tokens at once, each acting at the very token where plain `generate` stops.

B batch, n new tokens of a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from dspark_hf.generation.call.processors import PROMISE
from dspark_hf.generation.call.sequences import Sequences
from dspark_hf.generation.rows import NewTokens

# what these say of a row depends on its text alone, or on the clock
_OF_ROW = (MaxTimeCriteria, StopStringCriteria)


class StopRules:
    """Find where each row stops among its new tokens.

    Args:
        criteria: what `generate` prepared.
        sequences: the committed tokens.
    """

    def __init__(self, criteria: StoppingCriteriaList, sequences: Sequences):
        self._sequences = sequences
        self._eos = [criterion.eos_token_id for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
        # in their order, read from the device once
        self._ends = dict.fromkeys(token_id for eos in self._eos for token_id in eos.tolist())
        self._max_lengths = [
            criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)
        ]
        self._others = [
            criterion for criterion in criteria if not isinstance(criterion, (EosTokenCriteria, MaxLengthCriteria))
        ]

    @property
    def pads_finished_rows(self) -> bool:
        """Whether a finished row is padded; without an EOS criterion plain `generate` writes on until all are done."""
        return bool(self._eos)

    @property
    def has_others(self) -> bool:
        """Whether there are criteria beside ends and lengths."""
        return bool(self._others)

    @property
    def may_compare_rows(self) -> bool:
        """Whether a criterion may go by several rows at once, or by earlier calls: it must see them grow together."""
        return any(type(one) not in _OF_ROW and not getattr(one, PROMISE, False) for one in self._others)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a row."""
        return list(self._ends)

    @property
    def max_length(self) -> int | None:
        """The smallest maximal length, or None."""
        return min(self._max_lengths, default=None)

    def first_stops(
        self, rows: Sequence[int], new_tokens: NewTokens, scores_until: Callable[[int], Any]
    ) -> list[int | None]:
        """Return, per row of `rows`, how many of its `new_tokens` are kept, the stopping one included, or None.

        `scores_until(length)` gives the scores that plain `generate` would show a criterion at that length.
        """
        stops: list[int | None] = [None] * len(rows)
        for index, row in enumerate(rows):
            stops[index] = self._fixed_stop(self._sequences.lengths[row], new_tokens.ids[index])
        if self._others:
            self._ask_others(rows, new_tokens.tensors, stops, scores_until)
        return stops

    def common_stop(
        self,
        rows: Sequence[int],
        new_tokens: NewTokens,
        stopped: Container[int],
        scores_until: Callable[[int], Any],
    ) -> tuple[int, list[int]]:
        """Return how many `new_tokens` are kept of each of `rows` of one length, and the rows that stop there.

        Criteria are called as plain `generate` calls them: once a length, for all rows at that length. Behind the
        first stop of a row that is not among the `stopped` nothing is kept, since its text goes on otherwise.
        """
        length = self._sequences.lengths[rows[0]]
        fixed = [self._fixed_stop(length, tokens) for tokens in new_tokens.ids]
        count = min(len(tokens) for tokens in new_tokens.ids)
        ids = self._sequences.with_ahead(rows, torch.stack([tokens[:count] for tokens in new_tokens.tensors]))
        for kept in range(1, count + 1):
            prefix, scores = ids[:, : length + kept], scores_until(length + kept)
            done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
            for criterion in self._others:
                # a criterion may answer for the whole batch at once
                done = done | torch.as_tensor(criterion(prefix, scores), device=ids.device)
            are_over = done.tolist()
            stops = [row for row, stop in zip(rows, fixed, strict=True) if stop == kept or are_over[row]]
            stops = [row for row in stops if row not in stopped]
            if stops:
                return kept, stops
        return count, []

    def _fixed_stop(self, length: int, tokens: list[int]) -> int | None:
        candidates = [max(max_length - length, 1) for max_length in self._max_lengths]
        candidates += [place for place, token_id in enumerate(tokens, 1) if token_id in self._ends][:1]
        kept = min(candidates, default=len(tokens) + 1)
        return kept if kept <= len(tokens) else None

    def _ask_others(
        self,
        rows: Sequence[int],
        new_tokens: list[Tensor],
        stops: list[int | None],
        scores_until: Callable[[int], Any],
    ) -> None:
        width = max(len(tokens) for tokens in new_tokens)
        ahead = torch.stack([_pad(tokens, width, self._sequences.pad_token_id) for tokens in new_tokens])
        ids = self._sequences.with_ahead(rows, ahead)
        places = defaultdict(list)
        for index, row in enumerate(rows):
            for count in range(1, len(new_tokens[index]) + 1):
                places[self._sequences.lengths[row] + count].append((index, count))
        for length in sorted(places):
            waiting = [(i, count) for i, count in places[length] if count <= (stops[i] or count)]
            if not waiting:
                continue
            prefix, scores = ids[:, :length], scores_until(length)
            for criterion in self._others:
                # a criterion may answer for the whole batch at once
                done = torch.as_tensor(criterion(prefix, scores), device=ids.device).expand(len(ids))
                for index, count in waiting:
                    if bool(done[rows[index]]):
                        stops[index] = min(count, stops[index] or count)


def _pad(tokens: Tensor, width: int, pad_token_id: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, width - len(tokens)), value=pad_token_id)
