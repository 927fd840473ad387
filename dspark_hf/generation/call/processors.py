"""Logits processors over several positions at once, each seeing the very prefix it would see one token at a time.

B batch, b rows asked about, W positions, V vocab.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.logits_process import InfNanRemoveLogitsProcessor, SynthIDTextWatermarkLogitsProcessor

from dspark_hf.generation.call.sequences import Sequences
from dspark_hf.generation.compat import bind_row

# these look at one distribution at a time and at nothing else
_PREFIX_FREE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# these remember earlier calls, so calling them on drafts that are then rejected would change the output
_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


class ProcessorChain:
    """Apply a `LogitsProcessorList` to the logits of several positions of several rows.

    A processor is called with the whole batch, as plain `generate` calls it, once per prefix length; rows that are not
    at that length are cut or padded to it and their result is dropped. Positions behind a drafted end are passed over:
    nothing there becomes output, and plain `generate` never shows a processor text that goes on after its end.

    Args:
        processors: what `generate` prepared.
        sequences: the committed tokens.
        eos_token_ids: the tokens that end a row.

    Raises:
        ValueError: for a processor that keeps a state from call to call.
    """

    def __init__(self, processors: LogitsProcessorList, sequences: Sequences, eos_token_ids: Sequence[int] = ()):
        self._processors = list(processors)
        self._sequences = sequences
        self._eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.long, device=sequences.device)
        for processor in self._processors:
            if isinstance(processor, _STATEFUL):
                raise ValueError(
                    "`logits_processor` must not keep a state between calls when a drafter assists, got "
                    f"{type(processor).__name__}. Generate without `assistant_model`."
                )

    @property
    def is_empty(self) -> bool:
        """Whether logits pass unchanged."""
        return not self._processors

    def __call__(self, rows: Sequence[int], ahead: Tensor, logits: Tensor) -> Tensor:
        """Return the scores `(b, W, V)`, fp32, of `logits` `(b, W, V)`.

        Position w of row r stands after the row's committed tokens and the first `w + A - (W - 1)` of its `ahead`
        `(b, A)` tokens: the last position has seen them all.
        """
        scores = logits.float()
        if self.is_empty:
            return scores
        scores = scores.clone() if scores is logits else scores
        ids = self._sequences.with_ahead(rows, ahead)
        places = self._places(rows, ahead, logits.shape[1])
        for processor in self._processors:
            if type(processor) in _PREFIX_FREE:
                flat = scores.flatten(0, 1)
                scores = processor(ids.new_zeros(len(flat), 1), flat).view_as(scores)
            else:
                scores = _by_length(processor, rows, ids, places, scores)
        return scores

    def _places(self, rows: Sequence[int], ahead: Tensor, width: int) -> dict[int, list[tuple[int, int]]]:
        """Return, by prefix length, the indices and positions whose prefix has not ended."""
        skipped = ahead.shape[1] - (width - 1)
        num_ends = torch.isin(ahead, self._eos_token_ids).long().cumsum(-1)
        # how many of the tokens ahead an open prefix can hold
        num_open = (num_ends == 0).sum(-1).tolist()
        places = defaultdict(list)
        for index, row in enumerate(rows):
            for position in range(min(width, num_open[index] - skipped + 1)):
                places[self._sequences.lengths[row] + skipped + position].append((index, position))
        return places


def _by_length(
    processor: LogitsProcessor,
    rows: Sequence[int],
    ids: Tensor,
    places: dict[int, list[tuple[int, int]]],
    scores: Tensor,
) -> Tensor:
    result = scores.clone()
    for length, members in places.items():
        index = torch.tensor([member[0] for member in members], device=scores.device)
        position = torch.tensor([member[1] for member in members], device=scores.device)
        at_length = [rows[member[0]] for member in members]
        result[index, position] = _call(processor, ids[:, :length], at_length, scores[index, position])
    return result


def _call(processor: LogitsProcessor, ids: Tensor, rows: list[int], scores: Tensor) -> Tensor:
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        # asks the user about each row by its number: ask about the rows at hand only
        parts = [bind_row(processor, row)(ids[row : row + 1], scores[i : i + 1]) for i, row in enumerate(rows)]
        return torch.cat(parts)
    if len(rows) == len(ids):
        return processor(ids, scores)
    everyone = scores.new_zeros(len(ids), scores.shape[-1])
    everyone[rows] = scores
    processed: Tensor = processor(ids, everyone)[rows]
    return processed


def fill_empty(scores: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """Return draft scores `(b, V)` in which a row without any possible token can draft an end, or 0 if there is none.

    Processors may leave none of the proposable tokens. Any distribution is honest as long as it is the one drawn from.
    """
    only = torch.full_like(scores, float("-inf"))
    # some vocabularies are smaller than the ids of their ends
    only[:, next((token_id for token_id in eos_token_ids if token_id < scores.shape[-1]), 0)] = 0.0
    return torch.where(torch.isneginf(scores).all(-1, keepdim=True), only, scores)
