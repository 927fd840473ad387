"""What `generate` returns, one entry per generated token, gathered from passes that yield several tokens at once.

B batch, W positions, V vocab, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.generation.targets.interface import TargetPass


@dataclass
class DSparkGenerateOutput(GenerateDecoderOnlyOutput):
    """Transformers' output of `generate`, with the speculation's statistics in `statistics`."""

    statistics: SpeculationStatistics | None = None


class OutputRecorder:
    """Keep what `return_dict_in_generate` asks for, row by row, until all rows can be lined up.

    Args:
        generation_config: says what is asked for.
        batch_size: number of rows.
        has_streams_first: whether the model's hidden states are `(n, B, T, D)`, of which a pass has `(B, T, n, D)`.
    """

    def __init__(self, generation_config: GenerationConfig, batch_size: int, *, has_streams_first: bool = False):
        self._has_streams_first = has_streams_first
        wanted = bool(generation_config.return_dict_in_generate)
        self.returns_dict = wanted
        self.wants_scores = wanted and bool(generation_config.output_scores)
        self.wants_logits = wanted and bool(generation_config.output_logits)
        self.wants_hidden_states = wanted and bool(generation_config.output_hidden_states)
        self.wants_attentions = wanted and bool(generation_config.output_attentions)
        self._scores: list[list[Tensor]] = [[] for _ in range(batch_size)]
        self._logits: list[list[Tensor]] = [[] for _ in range(batch_size)]
        self._hidden_states: list[list[tuple[Tensor, ...]]] = [[] for _ in range(batch_size)]
        self._attentions: list[tuple[Tensor, ...]] = []

    def add(
        self, row: int, index: int, count: int, target_pass: TargetPass, scores: Tensor | None, *, is_prefill: bool
    ) -> None:
        """Record a row's `count` new tokens, the row being at `index` of the pass; `scores` `(B, W, V)`."""
        for position in range(count):
            if self.wants_scores and scores is not None:
                self._scores[row].append(scores[index, position].clone())
            if self.wants_logits:
                self._logits[row].append(target_pass.logits[index, position].float())
            if self.wants_hidden_states and target_pass.hidden_states is not None:
                span = slice(None) if is_prefill else slice(position, position + 1)
                self._hidden_states[row].append(tuple(layer[index, span] for layer in target_pass.hidden_states))
            if self.wants_attentions and target_pass.attentions is not None:
                self._attentions.append(_attention_at(target_pass.attentions, position, is_prefill))

    def trim(self, row: int, count: int) -> None:
        """Forget all but a row's first `count` tokens."""
        for kept in (self._scores, self._logits, self._hidden_states):
            del kept[row][count:]
        # attentions exist for a single row only
        if self.wants_attentions:
            del self._attentions[count:]

    def scores_until(self, count: int) -> tuple[Tensor, ...] | None:
        """Return the scores of the first `count` tokens as plain `generate` would hold them, or None."""
        if not self.wants_scores:
            return None
        return _line_up([row[:count] for row in self._scores])

    def build(self, sequences: Tensor, cache: Any, statistics: SpeculationStatistics) -> DSparkGenerateOutput:
        """Return the output object; what a finished row has no entry for is zero."""
        fields: dict[str, Any] = {
            "sequences": sequences,
            "scores": _line_up(self._scores) if self.wants_scores else None,
            "logits": _line_up(self._logits) if self.wants_logits else None,
            "hidden_states": self._lined_up_hidden_states() if self.wants_hidden_states else None,
            "attentions": tuple(self._attentions) if self.wants_attentions else None,
            CACHE_KEY: cache,
        }
        return DSparkGenerateOutput(**fields, statistics=statistics)

    def _lined_up_hidden_states(self) -> tuple[tuple[Tensor, ...], ...]:
        num_layers = len(self._hidden_states[0][0])
        layers = [
            _line_up([[token[layer] for token in row] for row in self._hidden_states]) for layer in range(num_layers)
        ]
        if self._has_streams_first:
            layers = [tuple(x.movedim(2, 0) if x.ndim == 4 else x for x in layer) for layer in layers]
        return tuple(zip(*layers, strict=True))


def _line_up(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    longest = max(rows, key=len)
    return tuple(
        torch.stack([row[i] if i < len(row) else torch.zeros_like(longest[i]) for row in rows])
        for i in range(len(longest))
    )


def _attention_at(attentions: tuple[Tensor, ...], position: int, is_prefill: bool) -> tuple[Tensor, ...]:
    if is_prefill:
        return attentions
    # a later position's keys are not yet there when tokens come one by one
    return tuple(
        layer[:, :, position : position + 1, : layer.shape[-1] - (layer.shape[2] - 1 - position)]
        for layer in attentions
    )
