"""What the decoding loop asks of the rows it writes.

b rows in the batch, k drafts so far, W positions of a verify pass, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dspark_hf.generation.scheduling.interface import Batch
from dspark_hf.generation.statistics import RoundInProgress
from dspark_hf.generation.targets.interface import TargetPass


@dataclass
class NewTokens:
    """What every row would get in a round: its accepted drafts and a bonus token behind them.

    `ids[r]` are known to the host, `tensors[r]` `(n,)` hold the same on the device.
    """

    ids: list[list[int]]
    tensors: list[Tensor]


class Rows(Protocol):
    """The rows of a batch and the rules by which they are written: one call of `generate`, or requests of a stream."""

    def batch(self) -> Batch:
        """Return what a schedule is told of the rows."""
        ...

    def anchors(self) -> Tensor:
        """Return every row's last committed token, `(b,)`."""
        ...

    @property
    def goes_by_ids(self) -> bool:
        """Whether draft scores are only to be had of the whole vocabulary, in the order of the ids."""
        ...

    @property
    def num_left(self) -> int | None:
        """How many of a slot's best tokens a draft can be; None for any number."""
        ...

    def draft_scores(self, logits: Tensor, drafted: Tensor, *, are_all: bool = True) -> Tensor:
        """Return the scores `(b, V)` of a slot's `logits` `(b, V)`, `drafted` `(b, k)` being the drafts before it.

        Unless they `are_all`, the logits are those of some tokens, in any order.
        """
        ...

    def scores(self, target_pass: TargetPass, drafts: Tensor) -> Tensor:
        """Return the scores `(b, W, V)` after processors, of a pass over `drafts` `(b, W - 1)` and what precedes."""
        ...

    @property
    def accept_in_steps(self) -> bool:
        """Whether scores may be asked for only behind text that is to stay: then by `scores_at`, never by `scores`."""
        ...

    def live(self) -> list[int]:
        """Return the indices of the rows that still write."""
        ...

    def scores_at(self, target_pass: TargetPass, drafts: Tensor, going: Sequence[int]) -> Tensor:
        """Return the scores `(b, V)` of a pass behind its first `drafts` `(b, k)`, which the rows `going` accepted.

        Other rows have zeros.
        """
        ...

    def going_on(self, going: Sequence[int], accepted: Sequence[bool], tokens: Tensor) -> list[int]:
        """Return which of the rows `going` look at a further draft, having got `tokens` `(b,)` or accepted them."""
        ...

    def is_end(self, index: int, token_id: int) -> bool:
        """Return whether a token ends the text of a row."""
        ...

    def with_noise(self, scores: Tensor, ahead: int, token_ids: Tensor | None = None) -> Tensor:
        """Return `scores` `(b, W, V)` with the noise of rows that draw by it: the best token is then what they draw.

        The first position stands `ahead` tokens behind the committed ones. Of scores of some tokens alone,
        `token_ids` `(V,)` or `(b, V)` say which.
        """
        ...

    def probabilities(self, scores: Tensor) -> Tensor | None:
        """Return what tokens are drawn from, fp32, shaped as `scores` `(b, *, V)`; None if all rows are greedy."""
        ...

    def commit(
        self, target_pass: TargetPass, scores: Tensor, new_tokens: NewTokens, record: RoundInProgress | None
    ) -> list[int]:
        """Append every row's tokens up to where it stops, and count the round; the prefill has no `record`.

        Returns how many tokens each row got.
        """
        ...

    def leave(self) -> list[int]:
        """Let rows that are over leave the batch.

        Returns the indices of those that stay, in their new order; none if the caches are to remain as they are.
        """
        ...
