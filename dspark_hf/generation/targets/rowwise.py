"""Rows of different lengths over a cache that keeps one length per row itself, as DeepSeek-V4's does.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import GenerationConfig

from dspark_hf.generation.compat import CACHE_KEY, mask_length
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.interface import TargetPass
from dspark_hf.generation.targets.padding import full_mask, run_packed


@runtime_checkable
class RowwiseCache(Protocol):
    """A cache whose rows have their own lengths; its model takes padding out by the attention mask."""

    lengths: list[int]
    num_columns: int
    max_rollback: int

    def take_back(self, num_tokens: Sequence[int]) -> None:
        """Take back the last `num_tokens[r]` tokens of every row."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch, in that order."""
        ...


class RowwiseTarget:
    """Run the target on one row or several, through its own cache.

    Args:
        adapter: the target, entered by the caller.
        input_ids: the prompts `(B, P)`.
        generation_config: the prepared generation configuration.
        model_kwargs: what `generate` prepared for the forward pass: the cache, and the attention mask `(B, S)`, S at
            least P where the cache came with tokens; None means no padding.
        widest: tokens a row that a verify pass may have to take back.

    Raises:
        ValueError: if the input is not text alone, or the cache cannot take back as much.
    """

    def __init__(
        self,
        adapter: TargetAdapter,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        widest: int,
    ):
        self._adapter = adapter
        self._model: Any = adapter.model
        self._cache: Any = model_kwargs[CACHE_KEY]
        if widest > self._cache.max_rollback:
            raise ValueError(
                f"`max_rollback` must be at least {widest}, the tokens of a verify pass, got "
                f"{self._cache.max_rollback}. Set `model.config.max_rollback = {widest}`, or draft fewer tokens."
            )
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "`inputs_embeds` must be left out when a drafter assists this target, got embeddings. Pass "
                "`input_ids`: both models need the tokens."
            )
        self._wants_hidden_states = bool(generation_config.output_hidden_states)
        past = int(self._cache.get_seq_length())
        attention_mask = model_kwargs.get("attention_mask")
        mask = full_mask(input_ids, attention_mask, past, mask_length(generation_config, attention_mask))
        self._prompt_ids = input_ids[:, past:] if mask.shape[1] == input_ids.shape[1] else input_ids
        self._new_mask = mask[:, past:]
        # left padding is gone once the prompts are packed; a returned cache has its columns again
        missing: list[int] = (~self._new_mask).sum(-1).tolist()
        self._num_padded = [past - length + count for length, count in zip(self._lengths(), missing, strict=True)]
        self._width = 0
        # tokens that are kept of every row; None before the prompts are in
        self._kept: list[int] | None = None

    def _lengths(self) -> list[int]:
        return list(self._cache.lengths) or [0] * len(self._prompt_ids)

    def prefill(self) -> TargetPass:
        """Process the prompts, packed to their rows' front, with logits of every row's last token."""
        target_pass = run_packed(self._run, self._prompt_ids, self._new_mask)
        self._kept = list(self._cache.lengths)
        return target_pass

    def verify(self, token_ids: Tensor) -> TargetPass:
        """Process every row's anchor and drafts `(B, W)`."""
        width = token_ids.shape[1]
        self._width = width
        return self._run(token_ids, [width] * len(token_ids), torch.arange(width, device=token_ids.device))

    def _run(self, token_ids: Tensor, num_tokens: list[int], kept: Tensor) -> TargetPass:
        starts = torch.tensor(self._lengths(), device=token_ids.device)
        columns = torch.arange(token_ids.shape[1], device=token_ids.device)
        is_real = None
        # without a mask every token is real; the cache knows what came before
        if min(num_tokens) < len(columns):
            is_real = columns < torch.tensor(num_tokens, device=columns.device)[:, None]
        outputs = self._model(
            input_ids=token_ids,
            attention_mask=is_real,
            use_cache=True,
            output_hidden_states=self._wants_hidden_states or None,
            logits_to_keep=kept,
            **{CACHE_KEY: self._cache},
        )
        return TargetPass(
            logits=outputs.logits,
            context_hidden_states=self._adapter.pop_context_hidden_states(),
            positions=starts[:, None] + columns,
            num_tokens=num_tokens,
            hidden_states=outputs.get("hidden_states"),
        )

    def keep(self, num_kept: Sequence[int]) -> None:
        """Take back every row's tokens behind the kept ones."""
        self._cache.take_back([self._width - count for count in num_kept])
        self._kept = list(self._cache.lengths)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        self._cache.select_rows(rows)
        self._kept = list(self._cache.lengths)
        self._num_padded = [self._num_padded[row] for row in rows.tolist()]

    def append_rows(self, other: Any) -> None:
        """Raise: other rows do not fit into this cache."""
        raise ValueError(
            f"`generate_stream` must run over a cache that takes rows in, got {type(self._cache).__name__}. Call "
            "`target.generate` for each request."
        )

    def returned_cache(self) -> Any:
        """Return the cache; its columns are those of the left-padded output."""
        lengths = zip(self._num_padded, self._cache.lengths, strict=True)
        self._cache.num_columns = max(padded + length for padded, length in lengths)
        return self._cache

    def release(self) -> None:
        """Take back what an interrupted round left in the cache."""
        if self._kept is not None:
            self._cache.take_back([now - kept for now, kept in zip(self._cache.lengths, self._kept, strict=True)])
            self.returned_cache()
