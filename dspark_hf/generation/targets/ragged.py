"""Several rows of different lengths over one cache: its own for targets with ordinary attention, else the model's.

B batch, P prompt, S columns so far, T tokens, W of a verify pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from dspark_hf.generation.compat import CACHE_KEY, mask_length
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.interface import RowwiseCache, TargetPass
from dspark_hf.generation.targets.padding import full_mask, pack_order, run_packed
from dspark_hf.generation.targets.prompts import check_inputs, check_own_cache, check_positions, embedded_types
from dspark_hf.generation.targets.ragged_cache import RaggedCache
from dspark_hf.generation.targets.trees import Tree, check_kept, read_tree, refuse_tree


class RaggedTarget:
    """Run the target on a batch of left-padded rows, each at its own length.

    `cache` holds the rows: the one in `model_kwargs` where that is a `RowwiseCache`, as DeepSeek-V4's, else a
    `RaggedCache`, which takes trees.

    Args:
        adapter: the target, entered by the caller.
        input_ids: the prompts `(B, P)`.
        generation_config: the prepared generation configuration.
        model_kwargs: what `generate` prepared for the forward pass: the cache, and the attention mask `(B, S)`, S at
            least P where the cache came with tokens; None means no padding.
        widest: tokens a row that a verify pass may have to take back.

    Raises:
        ValueError: if the target, its cache or an input cannot be handled row by row.
    """

    def __init__(
        self,
        adapter: TargetAdapter,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *,
        widest: int,
    ):
        self._adapter = adapter
        self._model: Any = adapter.model
        self._wants_hidden_states = bool(generation_config.output_hidden_states)
        given, attention_mask = model_kwargs[CACHE_KEY], model_kwargs.get("attention_mask")
        ragged: RaggedCache | None = None
        if isinstance(given, RowwiseCache):
            check_own_cache(given, model_kwargs, widest)
        else:
            check_inputs(adapter, generation_config, model_kwargs)
            ragged = RaggedCache(adapter.model, len(input_ids), given)
        self.cache: RowwiseCache = given if ragged is None else ragged
        past_length = int(given.get_seq_length())
        mask = full_mask(input_ids, attention_mask, past_length, mask_length(generation_config, attention_mask))
        self._new_mask = mask[:, past_length:]
        self._prompt_ids = input_ids[:, past_length:] if mask.shape[1] == input_ids.shape[1] else input_ids
        # those of the next pass, or the one of every token in it
        self._token_types: Tensor | None = None
        if ragged is not None:
            check_positions(model_kwargs.get("position_ids"), mask, past_length)
            self._set_token_types(embedded_types(adapter, model_kwargs.get("token_type_ids")))
            ragged.adopt(mask[:, :past_length])
        # left padding is gone once the prompts are packed; a returned cache has its columns again
        missing: list[int] = (~self._new_mask).sum(-1).tolist()
        self._num_padded = [past_length - held + new for held, new in zip(self._lengths(), missing, strict=True)]
        self._is_filled = False
        # of the last verify pass, until its tokens are kept
        self._starts: list[int] | None = None
        self._width = 0
        self._tree: Tree | None = None

    def _set_token_types(self, given: Tensor | None) -> None:
        if given is not None:
            given = given[:, -self._new_mask.shape[1] :].expand(len(self._prompt_ids), -1)
            self._token_types = given.gather(1, pack_order(self._new_mask)[0])
            self._last_types = given[:, -1:]

    def _lengths(self) -> list[int]:
        return list(self.cache.lengths) or [0] * len(self._prompt_ids)

    @property
    def takes_trees(self) -> bool:
        """Whether a verify pass may hold several drafts for one position."""
        return self.cache.takes_trees

    @property
    def has_token_types(self) -> bool:
        """Whether tokens are embedded with a type, which rows of another run may lack."""
        return self._token_types is not None

    def prefill(self) -> TargetPass:
        """Process the prompts, packed to their rows' front, with logits of every row's last token."""
        starts = self._lengths()
        target_pass = run_packed(self._run, self._prompt_ids, self._new_mask)
        if self._token_types is not None:
            self._token_types = self._last_types
        self.cache.keep(starts, [range(count) for count in target_pass.num_tokens])
        self._is_filled = True
        return target_pass

    def verify(self, token_ids: Tensor, parents: Tensor | None = None) -> TargetPass:
        """Process every row's anchor and drafts `(B, W)`, which continue each other as `parents` `(W,)` say."""
        width = token_ids.shape[1]
        if not self.takes_trees:
            refuse_tree(parents, width, type(self._model).__name__)
        self._width, self._tree = width, read_tree(parents, width)
        self._starts = self._lengths()
        columns = torch.arange(width, device=token_ids.device)
        return self._run(token_ids, [width] * len(token_ids), columns, are_drafts=True)

    def _run(
        self, token_ids: Tensor, num_tokens: list[int], kept_logits: Tensor, *, are_drafts: bool = False
    ) -> TargetPass:
        positions, inputs = self.cache.pass_inputs(
            num_tokens, token_ids.shape[1], token_ids.device, self._tree, are_drafts=are_drafts
        )
        keeps, types = self._adapter.accepts("logits_to_keep"), self._token_types
        outputs = self._model(
            input_ids=token_ids,
            use_cache=True,
            output_hidden_states=self._wants_hidden_states or None,
            return_dict=True,
            **{CACHE_KEY: self.cache},
            **inputs,
            **({"logits_to_keep": kept_logits} if keeps else {}),
            **({} if types is None else {"token_type_ids": types.expand(-1, token_ids.shape[1])}),
        )
        return TargetPass(
            logits=outputs.logits if keeps else outputs.logits[:, kept_logits],
            context_hidden_states=self._adapter.pop_context_hidden_states(positions),
            positions=positions,
            num_tokens=num_tokens,
            hidden_states=outputs.get("hidden_states"),
        )

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Let every row hold its kept tokens, and no others of the pass."""
        assert self._starts is not None
        check_kept(kept, self._width, self._tree)
        self.cache.keep(self._starts, kept)
        self._starts = None

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        self.cache.select_rows(rows)
        self._num_padded = [self._num_padded[row] for row in rows.tolist()]
        if self._token_types is not None:
            self._token_types = self._token_types[rows]

    def append_rows(self, other: RaggedTarget) -> None:
        """Append the rows of another run of the same target, which ends there; neither has token types."""
        self.cache.append_rows(other.cache)
        self._num_padded = self._num_padded + other._num_padded

    def returned_cache(self) -> Any:
        """Return a cache as plain `generate` would; one that the user brought is filled in place."""
        return self.cache.returned(self._num_padded)

    def release(self) -> None:
        """Take back what an interrupted round left in a cache of the user's."""
        if self._is_filled:
            self.cache.release(self._starts, self._num_padded)
