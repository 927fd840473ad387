"""What a forward pass of the target yields, and what the decoding loop asks of the target's cache.

B batch, T processed tokens, W positions with logits, of a verify pass its tokens, V vocab, D hidden, M tapped layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dspark_hf.generation.targets.trees import Tree


@dataclass
class TargetPass:
    """One forward pass.

    `logits` `(B, W, V)` of the last W tokens; `context_hidden_states` `(B, T, M * D)` and `positions` `(B, T)` of all
    processed tokens; `num_tokens`: how many of the T are real, per row; `hidden_states` and `attentions`: the model's
    own outputs if asked for, else None, hidden states with rows and tokens first, `(B, T, *)`.
    """

    logits: Tensor
    context_hidden_states: Tensor
    positions: Tensor
    num_tokens: list[int]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def along(self, path: list[int]) -> TargetPass:
        """Return what a verify pass over those of its tokens alone would have been, one behind the other."""
        states = self.hidden_states
        return replace(
            self,
            logits=self.logits[:, path],
            context_hidden_states=self.context_hidden_states[:, path],
            positions=self.positions[:, path],
            num_tokens=[len(path)] * len(self.logits),
            hidden_states=None if states is None else tuple(layer[:, path] for layer in states),
        )


def joined(passes: Sequence[TargetPass]) -> TargetPass:
    """Return passes over parts of the same prompts as one, with what the model put out last."""
    return replace(
        passes[-1],
        context_hidden_states=torch.cat([one.context_hidden_states for one in passes], dim=1),
        positions=torch.cat([one.positions for one in passes], dim=1),
        num_tokens=[sum(counts) for counts in zip(*(one.num_tokens for one in passes), strict=True)],
    )


class TargetState(Protocol):
    """The target with its cache over one call of `generate`."""

    @property
    def takes_trees(self) -> bool:
        """Whether a verify pass may hold several drafts for one position."""
        ...

    def prefill(self) -> TargetPass:
        """Process the prompts, with logits of their last token."""
        ...

    def verify(self, token_ids: Tensor, parents: Tensor | None = None) -> TargetPass:
        """Process `token_ids` `(B, W)`: every row's anchor and drafts.

        `parents` `(W,)` says for every token of the pass the index of the one that it continues, -1 for the first, the
        anchor; None is a chain, in which each continues the one before.

        Raises:
            ValueError: if `parents` form no tree, or one that this target does not take.
        """
        ...

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Take back all tokens of the last `verify` but those at the indices `kept[r]`, per row and in order.

        A chain keeps `range(n)`; a tree keeps a path that begins at the anchor.

        Raises:
            ValueError: if a token is kept without its parent.
        """
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch, in that order."""
        ...

    def append_rows(self, other: Any) -> None:
        """Append the rows of another run of the same target, which ends there; only `generate_stream` asks for it."""
        ...

    def returned_cache(self, sequences: Tensor) -> Any:
        """Return the cache in Transformers' own form, as it is behind the padded texts `sequences` `(B, S)`."""
        ...

    def release(self) -> None:
        """Leave a cache of the user's as it was before a pass whose tokens were not kept, and ready for other uses."""
        ...


@runtime_checkable
class RowwiseCache(Protocol):
    """A cache whose rows have their own lengths, each without padding: Transformers' layers in ours, or a model's own.

    The tokens of a pass count as held by some caches at once, by others when they are kept.
    """

    @property
    def lengths(self) -> list[int]:
        """How many tokens of every row are held; nothing where the number of rows is not known yet."""
        ...

    @property
    def max_rollback(self) -> int | None:
        """How many tokens a row can be taken back, None for any number."""
        ...

    @property
    def takes_trees(self) -> bool:
        """Whether a pass may hold several drafts for one position."""
        ...

    def pass_inputs(
        self, num_tokens: list[int], width: int, device: torch.device, tree: Tree | None, *, are_drafts: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the positions `(B, W)` of a pass over `width` tokens a row, and what the model must be told of them.

        `num_tokens[r]` of them are no padding; with `are_drafts`, only the first is sure to stay.
        """
        ...

    def keep(self, starts: Sequence[int], kept: Sequence[Sequence[int]]) -> None:
        """Let row r hold `starts[r]` tokens, as before the last pass, and those at `kept[r]` of the pass."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch, in that order."""
        ...

    def append_rows(self, other: Any) -> None:
        """Append the rows of another cache of the same model."""
        ...

    def returned(self, num_padded: Sequence[int]) -> Any:
        """Return the cache as plain `generate` would, with `num_padded[r]` columns of padding before each row."""
        ...

    def release(self, starts: Sequence[int] | None, num_padded: Sequence[int]) -> None:
        """Leave a cache of the user's ready for other uses, at the lengths `starts` if a pass was not finished."""
        ...
