"""Rows over a cache of one size, in passes of few widths, which are compiled where plain `generate` compiles its own.

B batch, W tokens of a verify pass, V vocab, D hidden, M tapped layers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from dspark_hf.generation.compat import compile_options, compiled_call, empty_cache_like, run_compiled
from dspark_hf.generation.fixed_size import FixedSize, fix_shapes
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.compiled_taps import can_tap_outputs
from dspark_hf.generation.targets.interface import TargetPass
from dspark_hf.generation.targets.ragged import RaggedTarget
from dspark_hf.generation.targets.ragged_cache import RaggedCache
from dspark_hf.generation.targets.static_cache import StaticRaggedCache

# A width is compiled once a text has asked for it more often than this; before, wider passes serve, if there were any.
# Plain choice: the last rounds of a text, which have room for few drafts, are not worth a graph.
_PATIENCE = 4
# slots of a row are a multiple of these: kernels work in tiles, and calls of about the same length share a graph
_SLOTS_AT_ONCE = 64


def pass_widths(widest: int) -> list[int]:
    """Return the widths of verify passes, up to the `widest`: few, since each is compiled for itself.

    Example:

        >>> pass_widths(8), pass_widths(6)
        ([1, 4, 8], [1, 4, 6])
    """
    # a pass without drafts is frequent while drafting does not pay; two tokens cost about as much as four
    doubled = [2**power for power in range(widest.bit_length()) if power != 1 and 2**power < widest]
    return [*doubled, widest]


class StaticTarget(RaggedTarget):
    """Run the target on rows at their own lengths, whose cache is made once.

    A verify pass is filled up to one of a few widths, with tokens behind every row's drafts that nothing sees and that
    are never kept. It runs through the model's own compiled call where plain `generate` would compile.

    Args:
        adapter: the target, entered by the caller.
        input_ids: the prompts `(B, P)`.
        generation_config: the prepared generation configuration.
        model_kwargs: what `generate` prepared for the forward pass, an empty static cache among it.
        widest: tokens a row of the widest verify pass.

    Raises:
        ValueError: if the target or an input cannot be handled row by row.
    """

    takes_trees = False

    def __init__(
        self,
        adapter: TargetAdapter,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *,
        widest: int,
    ):
        self._widths, self._config = pass_widths(widest), generation_config
        self._num_asked: Counter[int] = Counter()
        self._used: set[int] = set()
        self._compiled = compiled_call(adapter.model, model_kwargs, generation_config)
        try:
            super().__init__(adapter, input_ids, generation_config, model_kwargs, widest=widest)
        except ValueError as error:
            raise ValueError(
                f"{error} A static cache is served as several rows are: leave out `cache_implementation` for one row."
            ) from error
        if self._compiled is not None and not can_tap_outputs(adapter):
            self._compiled = None

    def _new_cache(self, batch_size: int, given: Any, generation_config: GenerationConfig, widest: int) -> RaggedCache:
        # longer than plain `generate` needs: drafts of the last round reach beyond the end
        longest = max(generation_config.max_length or 0, *(layer.get_max_length() for layer in given.layers))
        self._num_slots = num_slots = -(-(longest + widest) // _SLOTS_AT_ONCE) * _SLOTS_AT_ONCE
        return StaticRaggedCache(
            self._adapter.model, batch_size, given, num_slots=num_slots, sees_all=self._compiled is not None
        )

    def _cache_for_prompts(self) -> Any:
        # the given one is empty, and its layers lay columns out in their own ways
        return empty_cache_like(self._adapter.model)

    @property
    def size(self) -> FixedSize:
        """What stays as it is from pass to pass."""
        options = None if self._compiled is None else compile_options(self._model, self._config)
        return FixedSize(self._num_slots, tuple(self._widths), options)

    def verify(self, token_ids: Tensor, parents: Tensor | None = None) -> TargetPass:
        """Process every row's anchor and drafts `(B, W)`; `parents` `(W,)`, if given, must describe a chain."""
        width = token_ids.shape[1]
        padded = self._padded(width)
        target_pass = super().verify(nn.functional.pad(token_ids, (0, padded - width)), parents)
        target_pass.logits = target_pass.logits[:, :width]
        target_pass.num_tokens = [width] * len(token_ids)
        return target_pass

    def _padded(self, width: int) -> int:
        """Return to how many tokens a row a pass over `width` of them is filled up."""
        fitting = next(one for one in self._widths if one >= width)
        self._num_asked[fitting] += 1
        if self._compiled is not None and self._num_asked[fitting] <= _PATIENCE:
            fitting = min((one for one in self._used if one >= fitting), default=fitting)
        self._used.add(fitting)
        return fitting

    def _run(
        self, token_ids: Tensor, num_tokens: list[int], kept_logits: Tensor, *, are_drafts: bool = False
    ) -> TargetPass:
        # prompts have any length: compiled, each would be compiled anew
        if self._compiled is None or not are_drafts:
            return super()._run(token_ids, num_tokens, kept_logits, are_drafts=are_drafts)
        positions, inputs = self._inputs(token_ids, num_tokens, are_drafts=True)
        arguments = self._arguments(token_ids, self.cache, inputs, kept_logits)
        arguments["output_hidden_states"] = True if self._adapter.layer_ids else arguments["output_hidden_states"]
        fix_shapes(_tensors(arguments))
        # hooks would become part of the graph, which plain `generate` may share
        with self._adapter.untapped():
            outputs = run_compiled(self._compiled, **arguments)
        hidden_states = outputs.get("hidden_states")
        return TargetPass(
            # a graph that is replayed writes over what it gave before
            logits=outputs.logits.clone(),
            context_hidden_states=self._adapter.select_context(hidden_states, positions),
            positions=positions,
            num_tokens=num_tokens,
            hidden_states=tuple(state.clone() for state in hidden_states) if self._wants_hidden_states else None,
        )


def _tensors(arguments: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among a pass's arguments, masks by kind of layer included."""
    values = [one for value in arguments.values() for one in (value.values() if isinstance(value, dict) else (value,))]
    return [value for value in values if isinstance(value, Tensor)]
