"""Several rows of different lengths over one cache: its own for targets with ordinary attention, else the model's.

B batch, P prompt, S columns so far, T tokens, W of a verify pass.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from dspark_hf.generation.compat import CACHE_KEY, mask_length
from dspark_hf.generation.lean_passes import below_autograd
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.aligned_cache import AlignedCache, counts_columns
from dspark_hf.generation.targets.interface import RowwiseCache, TargetPass
from dspark_hf.generation.targets.masks import shows_past_windows
from dspark_hf.generation.targets.padding import full_mask, pack_order, run_packed
from dspark_hf.generation.targets.prompts import (
    check_chunks,
    check_inputs,
    check_length,
    check_own_cache,
    check_positions,
    check_preparation,
    embedded_types,
    has_images,
)
from dspark_hf.generation.targets.ragged_cache import RaggedCache
from dspark_hf.generation.targets.recurrent import RecurrentStates, cached_length
from dspark_hf.generation.targets.trees import Tree, check_kept, read_tree, refuse_tree


def new_cache(model: PreTrainedModel, batch_size: int, given: Any = None) -> RaggedCache | AlignedCache:
    """Return a cache of ours for rows of their own lengths, which come from the `given` one.

    Raises:
        ValueError: if a layer of the model is of a kind that cannot be kept row by row.
    """
    kind = AlignedCache if counts_columns(model) else RaggedCache
    return kind(model, batch_size, given)


class RaggedTarget:
    """Run the target on a batch of left-padded rows, each at its own length.

    `cache` holds the rows: the one in `model_kwargs` where that is a `RowwiseCache`, as DeepSeek-V4's, else a
    `RaggedCache`, which takes trees, or an `AlignedCache`.

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
        self._chunk_size = generation_config.prefill_chunk_size
        check_preparation(adapter.model)
        if shows_past_windows(adapter.model):
            raise ValueError(
                "`assistant_model` must be left out for several rows, or padded ones, of a target whose windows only "
                f"its cache knows, as {type(adapter.model).__name__}'s are. Generate the rows one by one, unpadded."
            )
        given, attention_mask = model_kwargs[CACHE_KEY], model_kwargs.get("attention_mask")
        embeds, given_ids = model_kwargs.get("inputs_embeds"), input_ids
        if embeds is not None:
            # the tokens that the embeddings stand for may not be known
            input_ids = input_ids.new_zeros(embeds.shape[:2])
        ragged: RaggedCache | AlignedCache | None = None
        width = mask_length(generation_config, attention_mask)
        past_length = cached_length(given, input_ids.shape[1], width)
        if isinstance(given, RowwiseCache):
            check_own_cache(given, model_kwargs, widest)
        else:
            check_inputs(adapter, generation_config, model_kwargs, past_length)
            check_length(adapter.config, generation_config, widest)
            ragged = self._new_cache(len(input_ids), given, generation_config, widest)
        self.cache: RowwiseCache = given if ragged is None else ragged
        self._states = RecurrentStates([]) if ragged is None else ragged.states
        self._mask = mask = full_mask(input_ids, attention_mask, past_length, width)
        self._new_mask = mask[:, past_length:]
        self._prompt_ids = input_ids[:, past_length:] if mask.shape[1] == input_ids.shape[1] else input_ids
        # those of the next pass, or the one of every token in it
        self._token_types: Tensor | None = None
        # what prompts with images, or of embeddings, are prepared from
        self._prompt_kwargs: dict[str, Any] | None = None
        # how far the model's positions are from ours behind images
        self._offsets: Tensor | None = None
        if ragged is not None and (embeds is not None or has_images(adapter, model_kwargs, past_length)):
            if self._chunk_size is not None:
                check_chunks(model_kwargs)
            repeats = past_length and width == input_ids.shape[1]
            if embeds is not None:
                check_positions(model_kwargs.get("position_ids"), mask, past_length)
            self._prompt_kwargs = {
                **model_kwargs,
                "next_sequence_length": input_ids.shape[1] - past_length if repeats or embeds is not None else None,
                "return_dict": True,
                "output_hidden_states": self._wants_hidden_states or None,
            }
            self._given_ids = given_ids
        elif ragged is not None:
            check_positions(model_kwargs.get("position_ids"), mask, past_length)
            self._set_token_types(embedded_types(adapter, model_kwargs.get("token_type_ids")))
            if not self._is_read_padded:
                ragged.adopt(mask, past_length)
        # padding is gone once the prompts are packed; a returned cache has its columns again
        self._num_padded: list[int] = (~mask).sum(-1).tolist()
        if ragged is None:
            # a cache of the model's own knows what it holds; ours may take over what there is with the prompts only
            missing = (~self._new_mask).sum(-1).tolist()
            self._num_padded = [past_length - held + new for held, new in zip(self._lengths(), missing, strict=True)]
        self._given = given
        self._is_filled = False
        # of the last verify pass, until its tokens are kept
        self._starts: list[int] | None = None
        self._width = 0
        self._tree: Tree | None = None

    def _new_cache(
        self, batch_size: int, given: Any, generation_config: GenerationConfig, widest: int
    ) -> RaggedCache | AlignedCache:
        return new_cache(self._adapter.model, batch_size, given)

    @property
    def _is_read_padded(self) -> bool:
        """Whether prompts are processed as plain `generate` does, padding included."""
        return bool(self._states.layers) or self._prompt_kwargs is not None or isinstance(self.cache, AlignedCache)

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
        if self._is_read_padded:
            return self._prefill_padded()
        target_pass = run_packed(self._run_chunk, self._prompt_ids, self._new_mask, self._chunk_size)
        if self._token_types is not None:
            self._token_types = self._last_types
        self._is_filled = True
        return target_pass

    def _prefill_padded(self) -> TargetPass:
        """Process the prompts as plain `generate` does.

        A state cannot step over padding behind a row's end, images are told where they stand by the model, embeddings
        may be of no tokens, and what counts columns is laid out so already.
        """
        assert isinstance(self.cache, RaggedCache | AlignedCache)
        mask, width = self._mask, self._new_mask.shape[1]
        cache = self._cache_for_prompts()
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -width:]
        if self._prompt_kwargs is None:
            outputs, context = self._call_in_chunks(cache, positions)
        else:
            outputs = self._call_prepared(cache)
            context = self._adapter.pop_context_hidden_states()
        self.cache.adopt(mask, mask.shape[1], cache)
        self._is_filled = True
        order, num_new = pack_order(self._new_mask)
        index = order.to(context.device)[..., None].expand(-1, -1, context.shape[-1])
        return TargetPass(
            logits=outputs.logits[:, -1:],
            context_hidden_states=context.gather(1, index),
            positions=positions.gather(1, order),
            num_tokens=num_new,
            hidden_states=self._adapter.rows_first(outputs.get("hidden_states")),
        )

    def _cache_for_prompts(self) -> Any:
        # one of the user's stays as it is until it is returned
        return copy.deepcopy(self._given)

    def _call_in_chunks(self, cache: Any, positions: Tensor) -> tuple[Any, Tensor]:
        """Return what the model says of the last chunk of the padded prompts, and the context `(B, T, *)` of all."""
        assert isinstance(self.cache, RaggedCache | AlignedCache)
        width, states, contexts = positions.shape[1], RecurrentStates(cache.layers), []
        past_length, size = self._mask.shape[1] - width, self._chunk_size or width
        if not self.cache.windows:
            # transformers 5.24: a pass over one column lets padding into the states; plain `generate` has no chunks
            size = max(size, 2)
        outputs: Any = None
        for start in range(0, width, size):
            end = min(start + size, width)
            # states alone look at the new columns only
            columns = self._mask[:, : past_length + end] if self.cache.windows else self._new_mask[:, start:end]
            inputs = {"position_ids": positions[:, start:end], "attention_mask": columns.long()}
            with states.watched(end - start, are_drafts=False):
                outputs = self._call(self._prompt_ids[:, start:end], cache, inputs, 1)
            contexts.append(self._adapter.pop_context_hidden_states())
        return outputs, torch.cat(contexts, dim=1)

    def _call_prepared(self, cache: Any) -> Any:
        """Return what the model says of prompts with images, or of embeddings, prepared by itself over `cache`."""
        assert self._prompt_kwargs is not None
        kwargs = {**self._prompt_kwargs, CACHE_KEY: cache}
        inputs = self._model.prepare_inputs_for_generation(self._given_ids, is_first_iteration=True, **kwargs)
        known = inputs.get("position_ids")
        if known is not None:
            # an image may take up fewer positions than it has tokens: (B), or (planes, B)
            self._offsets = known[..., -1] - (self._mask.long().sum(-1) - 1)
        if "logits_to_keep" in inputs:
            # a tensor, since an integer lets shared layers skip the other positions, and with them our taps
            last = self._new_mask.shape[1] - 1
            inputs["logits_to_keep"] = torch.tensor([last], device=self._adapter.device)
        # neither is needed again
        self._prompt_kwargs = None
        with below_autograd(self._model):
            return self._model(**inputs)

    def _run_chunk(self, token_ids: Tensor, num_tokens: list[int], kept_logits: Tensor) -> TargetPass:
        """Process what comes next of the packed prompts, to stay."""
        starts, prompt_types, width = self._lengths(), self._token_types, token_ids.shape[1]
        if prompt_types is not None:
            self._token_types = prompt_types[:, :width]
        target_pass = self._run(token_ids, num_tokens, kept_logits)
        if prompt_types is not None:
            self._token_types = prompt_types[:, width:]
        self.cache.keep(starts, [range(count) for count in num_tokens])
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
        positions, inputs = self._inputs(token_ids, num_tokens, are_drafts=are_drafts)
        # prompts are read elsewhere where there are states
        with self._states.watched(token_ids.shape[1], are_drafts=True):
            outputs = self._call(token_ids, self.cache, inputs, kept_logits)
        return TargetPass(
            logits=outputs.logits if self._adapter.accepts("logits_to_keep") else outputs.logits[:, kept_logits],
            context_hidden_states=self._adapter.pop_context_hidden_states(positions),
            positions=positions,
            num_tokens=num_tokens,
            hidden_states=self._adapter.rows_first(outputs.get("hidden_states")),
        )

    def _inputs(self, token_ids: Tensor, num_tokens: list[int], *, are_drafts: bool) -> tuple[Tensor, dict[str, Any]]:
        positions, inputs = self.cache.pass_inputs(
            num_tokens, token_ids.shape[1], token_ids.device, self._tree, are_drafts=are_drafts
        )
        if self._offsets is not None:
            inputs["position_ids"] = inputs["position_ids"] + self._offsets[..., None]
        if self._token_types is not None:
            inputs["token_type_ids"] = self._token_types.expand(-1, token_ids.shape[1])
        return positions, inputs

    def _call(self, token_ids: Tensor, cache: Any, inputs: dict[str, Any], kept_logits: Tensor | int) -> Any:
        with below_autograd(self._model):
            return self._model(**self._arguments(token_ids, cache, inputs, kept_logits))

    def _arguments(
        self, token_ids: Tensor, cache: Any, inputs: dict[str, Any], kept_logits: Tensor | int
    ) -> dict[str, Any]:
        names = {name: self._adapter.accepts(name) for name in ("position_ids", "logits_to_keep")}
        inputs = {**inputs, "logits_to_keep": kept_logits}
        return {
            "input_ids": token_ids,
            "use_cache": True,
            "output_hidden_states": self._wants_hidden_states or None,
            "return_dict": True,
            CACHE_KEY: cache,
            **{name: value for name, value in inputs.items() if names.get(name, True)},
        }

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
        if self._offsets is not None:
            self._offsets = self._offsets[..., rows]

    def append_rows(self, other: RaggedTarget) -> None:
        """Append the rows of another run of the same target, which ends there; neither has token types."""
        self.cache.append_rows(other.cache)
        self._num_padded = self._num_padded + other._num_padded

    def returned_cache(self, sequences: Tensor) -> Any:
        """Return a cache as plain `generate` would; one that the user brought is filled in place."""
        self._process_rest(sequences)
        return self.cache.returned(self._num_padded)

    def _process_rest(self, sequences: Tensor) -> None:
        """Process what plain `generate` has of rows that ended early: their last token, and padding behind it."""
        ends = [padded + length for padded, length in zip(self._num_padded, self._lengths(), strict=True)]
        missing = [max(ends) - end for end in ends]
        width = max(missing)
        if not width:
            return
        # the last token of the longest row is not processed
        rest = sequences.new_zeros(len(missing), width)
        for row, count in enumerate(missing):
            rest[row, :count] = sequences[row, sequences.shape[1] - 1 - count : -1]
        self._starts, self._width, self._tree = self._lengths(), width, None
        device = self._adapter.device
        self._run(rest.to(device), missing, torch.tensor([width - 1], device=device))
        self.keep([range(count) for count in missing])

    def release(self) -> None:
        """Take back what an interrupted round left in a cache of the user's."""
        if self._is_filled:
            self.cache.release(self._starts, self._num_padded)
