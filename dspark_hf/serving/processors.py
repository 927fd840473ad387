"""What a request's fields do to logits, and how its tokens' probabilities are read.

Each depends on the text so far and on nothing else, so that drafts are judged by it in one pass. V vocab.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import LogitsProcessor


class CountPenalties(LogitsProcessor):
    """Lower the logits of tokens that the answer has already, as the API defines it.

    Args:
        prompt_length: tokens that do not count.
        presence: subtracted once from each of the others.
        frequency: subtracted for each time.
    """

    depends_on_prefix_alone = True

    def __init__(self, prompt_length: int, presence: float, frequency: float):
        self._prompt_length, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the lowered scores `(b, V)`."""
        written = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class TokenBias(LogitsProcessor):
    """Add to the logits of some tokens.

    Args:
        biases: what is added, by token id.
    """

    depends_on_prefix_alone = True

    def __init__(self, biases: Mapping[int, float]):
        self._ids = torch.tensor(list(biases), dtype=torch.long)
        self._biases = torch.tensor(list(biases.values()))
        self._largest = max(biases)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores `(b, V)` with the biases."""
        # an index out of range would break an accelerator for everybody
        if self._largest >= scores.shape[1]:
            raise ValueError(
                f"`logit_bias` must name tokens below {scores.shape[1]}, got {self._largest}. Correct it."
            )
        return scores.index_add(1, self._ids.to(scores.device), self._biases.to(scores).expand(len(scores), -1))


class LogprobRecorder(LogitsProcessor):
    """Remember what the target thought of each position until its token is known.

    It changes nothing, and what drafts that were not accepted left behind is overwritten before it is read: the
    target's pass over a position comes after the drafter's, and the last pass over it is the one that its token comes
    from.

    Args:
        num_top: alternatives to tell of each token.
    """

    depends_on_prefix_alone = True

    def __init__(self, num_top: int):
        self._num_top = num_top
        self._rows: dict[int, Tensor] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Keep `scores` `(1, V)`, and return them."""
        self._rows[input_ids.shape[1]] = scores[0]
        return scores

    def take(self, position: int, token_id: int) -> tuple[float, list[tuple[int, float]]]:
        """Return the log probability of a position's token, and the most probable ones with theirs."""
        logprobs = torch.log_softmax(self._rows[position].float(), dim=-1)
        self._rows = {place: row for place, row in self._rows.items() if place > position}
        values, ids = logprobs.topk(min(self._num_top, len(logprobs)))
        return float(logprobs[token_id]), list(zip(ids.tolist(), values.tolist(), strict=True))
