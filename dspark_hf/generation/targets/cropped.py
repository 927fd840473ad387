"""One row with the cache that `generate` prepared, or that the user brought: used as it is, cropped to roll back.

W positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import CacheLayerMixin

from dspark_hf.generation.compat import CACHE_KEY, empty_cache_like, mask_length, stop_recording
from dspark_hf.generation.lean_passes import below_autograd
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.branching import branched_inputs, can_branch, close_up
from dspark_hf.generation.targets.interface import TargetPass, joined
from dspark_hf.generation.targets.masks import shows_past_windows
from dspark_hf.generation.targets.prompts import check_chunks, foreign_preparation
from dspark_hf.generation.targets.trees import Tree, chain_of, check_kept, is_front, read_tree, refuse_tree

_PER_TOKEN_KWARGS = ("token_type_ids", "mm_token_type_ids")


class SingleRowTarget:
    """Run the target on one unpadded row; `takes_trees` where it has ordinary attention over text alone.

    Args:
        adapter: the target, entered by the caller.
        input_ids: the prompt `(1, P)`.
        generation_config: the prepared generation configuration.
        model_kwargs: what `generate` prepared for the forward pass.
    """

    def __init__(
        self,
        adapter: TargetAdapter,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        self._adapter = adapter
        self._model: Any = adapter.model
        self._cache = model_kwargs[CACHE_KEY]
        self._generation_config = generation_config
        self._kwargs = {**model_kwargs, "return_dict": True}
        self._kwargs.update(
            output_hidden_states=generation_config.output_hidden_states or None,
            output_attentions=generation_config.output_attentions or None,
        )
        self._ids = input_ids
        self._must_mask = self._check_windows()
        self._tree: Tree | None = None
        self._prompt_length = 0
        # tokens that are kept, and those of a pass behind them of which nothing is known yet
        self._length = self._held()
        self._width = 0

    @cached_property
    def takes_trees(self) -> bool:
        """Whether a verify pass may hold several drafts for one position."""
        return can_branch(self._adapter, self._generation_config, self._kwargs)

    def _check_windows(self) -> bool:
        """Return whether the tokens of a pass have to be told by a mask how far back they see."""
        if not shows_past_windows(self._model):
            return False
        if not self.takes_trees:
            raise ValueError(
                f"`assistant_model` must be left out for {type(self._model).__name__}, whose windows only its cache "
                "knows, unless a call has text alone, under 'eager' or 'sdpa', no cache of its own kind, and no "
                "`output_attentions`. Leave those out, or the drafter."
            )
        return True

    def _held(self) -> int:
        """Return how many tokens the cache holds when the call starts."""
        return int(self._cache.get_seq_length())

    def prefill(self) -> TargetPass:
        """Process what of the prompt the cache does not hold yet."""
        # sliding layers forget on update unless told to wait for a crop
        self._cache.activate_past_recording()
        past_length = self._length
        embeds = self._kwargs.get("inputs_embeds")
        next_length = None
        if embeds is not None:
            next_length = embeds.shape[1] - past_length
        elif mask_length(self._generation_config, self._kwargs.get("attention_mask")) == self._ids.shape[1]:
            # the prompt repeats what the cache holds
            next_length = self._ids.shape[1] - past_length
        inputs = self._model.prepare_inputs_for_generation(
            self._ids, next_sequence_length=next_length, is_first_iteration=True, **self._kwargs
        )
        if inputs.get(CACHE_KEY) is None:
            # Phi-3 computes a cache anew that ends before its rotary embedding switches
            stop_recording(self._cache)
            self._cache, self._length, past_length = empty_cache_like(self._model), 0, 0
            self._cache.activate_past_recording()
            self._kwargs[CACHE_KEY] = inputs[CACHE_KEY] = self._cache
        owner = foreign_preparation(self._model)
        is_same = inputs[CACHE_KEY] is self._cache and (embeds is None) == (inputs.get("inputs_embeds") is None)
        if owner is not None and not is_same:
            raise ValueError(
                "`prepare_inputs_for_generation` must leave tokens and cache as they are when a drafter assists, got "
                f"others from {type(owner).__name__}. Generate without `assistant_model`."
            )
        num_tokens = (inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]).shape[1]
        self._check_covered(past_length + num_tokens)
        target_pass = self._run_prompt(inputs, num_tokens, past_length)
        self._check_filled(past_length + num_tokens)
        self._finish_prefill()
        self._length = self._prompt_length = past_length + num_tokens
        return target_pass

    def _finish_prefill(self) -> None:
        if not self._cache.is_croppable:
            raise ValueError(
                f"`{CACHE_KEY}` must be a cache that can be rolled back, got {type(self._cache).__name__} for "
                f"{type(self._model).__name__}. Leave out `cache_implementation`, or generate without "
                "`assistant_model`."
            )
        self._trim()

    def _trim(self) -> None:
        self._cache.crop(0)

    def _check_covered(self, length: int) -> None:
        mask = self._kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] > length:
            # transformers 5.17: Phi-3 drops the cache, and yet reads only what the cache did not hold
            raise ValueError(
                f"`{CACHE_KEY}` must be left out here when a drafter assists: {type(self._model).__name__} drops it, "
                f"and reads {length} of {mask.shape[1]} tokens. Leave it out."
            )

    def _check_filled(self, length: int) -> None:
        held = int(self._cache.get_seq_length())
        if held != length:
            raise ValueError(
                f"`target` must hold every token once in the cache it is given, got {held} after {length} tokens for "
                f"{type(self._model).__name__}. No drafter can assist it: generate without `assistant_model`."
            )

    def _run_prompt(self, inputs: dict[str, Any], num_tokens: int, past_length: int) -> TargetPass:
        """Process a prompt at once, or in chunks of `prefill_chunk_size`, as plain `generate` cuts it."""
        size = self._generation_config.prefill_chunk_size
        if size is None or size >= num_tokens:
            return self._run(inputs, num_tokens, 1, past_length)
        check_chunks(self._kwargs)
        passes = []
        for start in range(0, num_tokens, size):
            ids = self._ids[:, -num_tokens:][:, start : start + size]
            kwargs = self._cut(num_tokens - start - ids.shape[1], ids.shape[1])
            inputs = self._model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
            passes.append(self._run(inputs, ids.shape[1], 1, past_length + start))
            # sliding layers are trimmed to their window between chunks, too
            self._trim()
        return joined(passes)

    def _cut(self, num_behind: int, num_tokens: int) -> dict[str, Any]:
        """Return the arguments of a pass over `num_tokens` of the prompt with `num_behind` of them to come."""
        kwargs = dict(self._kwargs)
        for name in ("attention_mask", *_PER_TOKEN_KWARGS):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][:, : kwargs[name].shape[1] - num_behind]
        if kwargs.get("position_ids") is not None:
            end = kwargs["position_ids"].shape[-1] - num_behind
            kwargs["position_ids"] = kwargs["position_ids"][..., end - num_tokens : end]
        return kwargs

    def verify(self, token_ids: Tensor, parents: Tensor | None = None) -> TargetPass:
        """Process anchor and drafts `(1, W)`, which continue each other as `parents` `(W,)` say."""
        width, past_length = token_ids.shape[1], self._length
        if parents is not None and not self.takes_trees:
            refuse_tree(parents, width, f"one unpadded row of {type(self._model).__name__}")
        tree = read_tree(parents, width)
        if tree is None and width > 1 and self._must_mask:
            tree = chain_of(width)
        inputs = self._model.prepare_inputs_for_generation(
            token_ids, next_sequence_length=width, is_first_iteration=False, **self._lengthened(width, past_length)
        )
        if tree is not None:
            inputs = branched_inputs(self._adapter, self._cache, inputs, tree, past_length)
        target_pass = self._run(inputs, width, width, past_length)
        if tree is not None:
            depths = torch.tensor(tree.depths, device=target_pass.positions.device)
            target_pass = replace(target_pass, positions=past_length + depths[None])
        self._width, self._tree = width, tree
        return target_pass

    def _lengthened(self, width: int, past_length: int) -> dict[str, Any]:
        kwargs = dict(self._kwargs)
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is not None:
            ones = attention_mask.new_ones(1, past_length + width - attention_mask.shape[1])
            kwargs["attention_mask"] = torch.cat([attention_mask, ones], dim=1)
        positions = kwargs.get("position_ids")
        if positions is not None:
            # the prompt's last position and how many tokens followed it; 3-D positions of vision models grow alike
            steps = past_length - self._prompt_length + 1 + torch.arange(width, device=positions.device)
            kwargs["position_ids"] = positions[..., -1:] + steps
        for name in _PER_TOKEN_KWARGS:
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][:, -1:].expand(-1, width)
        kwargs.pop("inputs_embeds", None)
        return kwargs

    def _run(self, inputs: dict[str, Any], num_tokens: int, width: int, past_length: int) -> TargetPass:
        device = self._adapter.device
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = _last_positions(num_tokens, width, device)
        with below_autograd(self._model):
            outputs = self._model(**inputs)
        positions = (past_length + torch.arange(num_tokens, device=device))[None]
        return TargetPass(
            logits=outputs.logits[:, -width:],
            context_hidden_states=self._adapter.pop_context_hidden_states(positions),
            positions=positions,
            num_tokens=[num_tokens],
            hidden_states=self._adapter.rows_first(outputs.get("hidden_states")),
            attentions=outputs.get("attentions"),
        )

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Crop the cache behind the kept tokens."""
        check_kept(kept, self._width, self._tree)
        if not is_front(kept[0]):
            close_up(self._cache.layers, self._width, kept[0])
        num_kept = len(kept[0])
        self._length += num_kept
        # even a crop of nothing is needed: it trims sliding layers to their window
        self._cache.crop(num_kept - self._width)
        self._width = 0

    def select_rows(self, rows: Tensor) -> None:
        """Nothing to select from."""

    def append_rows(self, other: Any) -> None:
        """Raise: other rows do not fit into this cache."""
        raise ValueError(
            f"`generate_stream` must run over a cache that takes rows in, got {type(self._cache).__name__}. Call "
            "`target.generate` for each request."
        )

    def returned_cache(self, sequences: Tensor) -> Any:
        """Return the cache."""
        return self._cache

    def release(self) -> None:
        """Take back what an interrupted round left in the cache, and let it forget on update again."""
        for layer in self._cache.layers:
            # a pass that was interrupted itself has reached some layers only; convolutions do not know their length
            is_long = isinstance(layer, CacheLayerMixin)
            surplus = layer.get_seq_length() - self._length if is_long else self._width
            if surplus > 0:
                layer.crop(-surplus)
        stop_recording(self._cache)


def _last_positions(num_tokens: int, width: int, device: torch.device) -> Tensor:
    """Return the indices of the last `width` of `num_tokens` positions, for `logits_to_keep`.

    A tensor, since an integer lets Gemma 4's shared layers skip the other positions, and with them our taps.
    """
    return torch.arange(num_tokens - width, num_tokens, device=device)
