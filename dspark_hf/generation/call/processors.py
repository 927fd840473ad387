"""Logits processors as plain `generate` calls them, although several tokens of a row become known at once.

What Transformers brings depends on the prefix alone and is called for many positions together. What a user brings may
remember its calls: it is called for committed text only, once for each token, in order.

B batch, b rows asked about, A tokens ahead, W positions, V vocab.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
)
from transformers.generation.logits_process import InfNanRemoveLogitsProcessor, SynthIDTextWatermarkLogitsProcessor

from dspark_hf.generation.call.nucleus import top_p_scores
from dspark_hf.generation.call.sequences import Sequences
from dspark_hf.generation.compat import bind_row, user_function

# these look at one distribution at a time and at nothing else
_PREFIX_FREE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# among them the only one that goes by a token's id
_OF_IDS = (SuppressTokensLogitsProcessor,)
# these look at the prefix as well, and remember nothing of it
_OF_PREFIX = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    WatermarkLogitsProcessor,
)
# what a processor, or a `prefix_allowed_tokens_fn`, may say of itself: that it remembers nothing
PROMISE = "depends_on_prefix_alone"
# one runs the target itself, the other watermarks by what it drew in earlier calls
_REFUSED = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


class ProcessorChain:
    """Apply a `LogitsProcessorList` to the logits of several rows.

    The processors of Transformers that depend on the prefix alone are *known*, by their very class, and so are those
    whose attribute `depends_on_prefix_alone` is true. Every other one, `prefix_allowed_tokens_fn` included, may
    remember its calls, and whether it does cannot be seen from outside: its memory may lie in a closure, a generator,
    or a library's own object.

    Where all are known, the chain is called for many positions at once: each processor with the whole batch, once per
    prefix length; rows that are not at that length are cut or padded to it and their result is dropped. Positions
    behind a drafted end are passed over: nothing there becomes output, and plain `generate` never shows a processor
    text that goes on after its end.

    Otherwise `at` gives the scores of one position, whose prefix must be committed, and calls what plain `generate`
    calls. Drafts are drawn without the unknown ones.

    Args:
        processors: what `generate` prepared.
        sequences: the committed tokens.
        eos_token_ids: the tokens that end a row.

    Raises:
        ValueError: for guidance and SynthID's watermark.
    """

    def __init__(self, processors: LogitsProcessorList, sequences: Sequences, eos_token_ids: Sequence[int] = ()):
        self._processors = list(processors)
        self._known = [one for one in self._processors if _is_known(one)]
        counts = [one.top_k for one in self._known if type(one) is TopKLogitsWarper]
        # how many tokens a top-k leaves, ties aside; None where there is none
        self.num_left = min(counts, default=None)
        self._sequences = sequences
        self._eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.long, device=sequences.device)
        for processor in self._processors:
            if isinstance(processor, _REFUSED):
                raise ValueError(
                    "`logits_processor` must not keep a state between calls when a drafter assists, got "
                    f"{type(processor).__name__}. Generate without `assistant_model`."
                )

    @property
    def is_empty(self) -> bool:
        """Whether logits pass unchanged."""
        return not self._processors

    @property
    def may_remember(self) -> bool:
        """Whether a processor may remember its calls, so that it must be called for committed text only."""
        return len(self._known) < len(self._processors)

    @property
    def goes_by_ids(self) -> bool:
        """Whether a known processor goes by tokens' ids, so that it must be shown the logits of all in their order."""
        return any(type(one) not in _PREFIX_FREE or type(one) in _OF_IDS for one in self._known)

    def __call__(self, rows: Sequence[int], ahead: Tensor, logits: Tensor) -> Tensor:
        """Return the scores `(b, W, V)`, fp32, that the known processors make of `logits` `(b, W, V)`.

        Position w of row r stands after the row's committed tokens and the first `w + A - (W - 1)` of its `ahead`
        `(b, A)` tokens: the last position has seen them all.
        """
        scores = logits.float()
        if not self._known:
            return scores
        scores = scores.clone() if scores is logits else scores
        ids, places = ahead, {}
        if not all(type(processor) in _PREFIX_FREE for processor in self._known):
            # where prefixes end, the host must ask the device
            ids, places = self._sequences.with_ahead(rows, ahead), self._places(rows, ahead, logits.shape[1])
        for processor in self._known:
            if type(processor) in _PREFIX_FREE:
                flat = scores.flatten(0, 1)
                scores = _apply(processor, ahead.new_zeros(len(flat), 1), flat).view_as(scores)
            else:
                scores = _by_length(processor, rows, ids, places, scores)
        return scores

    def at(self, rows: Sequence[int], ahead: Tensor, logits: Tensor) -> Tensor:
        """Return the scores `(b, V)` that all processors make of `logits` `(b, V)`, behind text that is to stay.

        `rows` have the same length; with their tokens `ahead` `(b, A)` they stand where plain `generate` would call
        the processors next. Rows of the batch that are over are shown to them too, padded.
        """
        length = self._sequences.lengths[rows[0]] + ahead.shape[1]
        ids = self._sequences.with_ahead(rows, ahead)[:, :length]
        scores = logits.new_zeros(len(ids), logits.shape[-1], dtype=torch.float32)
        scores[list(rows)] = logits.float()
        for processor in self._processors:
            scores = _apply(processor, ids, scores)
        return scores[list(rows)]

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


def _apply(processor: LogitsProcessor, ids: Tensor, scores: Tensor) -> Tensor:
    if type(processor) is TopPLogitsWarper:
        return top_p_scores(processor, scores)
    result: Tensor = processor(ids, scores)
    return result


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
        processed = _call(processor, ids[:, :length], at_length, scores[index, position])
        # a user's own may answer in another dtype
        result[index, position] = processed.to(result.dtype)
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


def _is_known(processor: LogitsProcessor) -> bool:
    if type(processor) in (*_PREFIX_FREE, *_OF_PREFIX):
        return True
    is_constraint = isinstance(processor, PrefixConstrainedLogitsProcessor)
    said_by: Any = user_function(processor) if is_constraint else processor
    return bool(getattr(said_by, PROMISE, False))


def fill_empty(scores: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """Return draft scores `(b, V)` in which a row without a distribution drafts an end, or 0 if there is none.

    Processors may leave none of the proposable tokens, and a drafter's weights may overflow. Any distribution is
    honest as long as it is the one drawn from.
    """
    only = scores.new_full((scores.shape[-1],), float("-inf"))
    # some vocabularies are smaller than the ids of their ends
    only[next((token_id for token_id in eos_token_ids if token_id < scores.shape[-1]), 0)] = 0.0
    # infinite above, nowhere finite, or not a number
    return torch.where(torch.isfinite(scores.amax(-1, keepdim=True)), scores, only)
