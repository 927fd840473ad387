"""Layers that carry a state: taken back by running their recurrence again over the kept tokens.

B rows, T tokens, C channels, K inputs in the window of a short convolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from dspark_hf.generation.targets.recurrences import Watch, watching

# what a layer of the cache knows of its states, by their number
_FIELDS = (
    "conv_states",
    "recurrent_states",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
)
Fields = dict[str, dict[int, Any]]


class RecurrentStates:
    """The states and convolution windows of a cache's recurrent layers, over one pass at a time.

    Args:
        layers: the layers of the cache; others than recurrent ones are left alone.
    """

    def __init__(self, layers: Sequence[Any]):
        self._of_cache = layers
        self._before: list[Fields] = []
        self._watch: Watch | None = None
        self._width = 0

    @property
    def layers(self) -> list[Any]:
        """The recurrent ones of the cache's layers, of which a model that loops adds some in its first pass."""
        return [layer for layer in self._of_cache if is_recurrent_layer(layer)]

    @property
    def are_seen(self) -> bool:
        """Whether the last pass ran the recurrences of all states where they can be seen."""
        if self._watch is None or not self._watch.states:
            return True
        recurrence, calls = self._watch.recurrence, self._watch.calls
        return recurrence is not None and len(calls) == len(recurrence.parts(self._watch.states))

    @contextmanager
    def watched(self, width: int, *, are_drafts: bool) -> Iterator[None]:
        """Remember what there is before a pass over `width` tokens a row."""
        if not self.layers:
            yield
            return
        before = [_fields(layer) for layer in self.layers]
        # the chunks of a prompt are taken back together
        if are_drafts or self._watch is None:
            self._before = before
        self._width = width
        for layer in self.layers:
            # windows then keep all that a pass puts in, which of a long prompt would be a lot
            layer.record_past = are_drafts or _has_window(layer)
        self._watch = Watch(_states(before), are_drafts)
        with watching(self._watch):
            yield

    def keep(self, num_kept: Sequence[int]) -> None:
        """Take back all but the first `num_kept[r]` tokens that row r had in the last pass; a prefill keeps all."""
        watch, width = self._watch, self._width
        if watch is not None and not watch.are_drafts:
            for layer in filter(_has_window, self.layers):
                for index, window in _present(layer.conv_states).items():
                    layer.conv_states[index] = window[..., -layer.conv_kernel_size[index] :]
        elif watch is not None:
            for layer, before in zip(self.layers, self._before, strict=True):
                for index, window in _present(before["conv_states"]).items():
                    inputs = layer.conv_states[index][..., -width:]
                    layer.conv_states[index] = window_behind(window, inputs, num_kept)
                layer.record_past = _has_window(layer)
            if min(num_kept) < width:
                self._advance_again(watch, num_kept)
        self._before, self._watch = [], None

    def _advance_again(self, watch: Watch, num_kept: Sequence[int]) -> None:
        states, longest = _states([_fields(layer, copy=False) for layer in self.layers]), max(num_kept)
        if not states:
            return
        if longest == 0 or self._width == 1:
            for state, before in zip(states, watch.states, strict=True):
                stays = torch.tensor(num_kept, device=state.device) == 0
                state[stays] = before[stays]
            return
        recurrence = watch.recurrence
        if recurrence is None or not self.are_seen:
            raise RuntimeError(
                f"`assistant_model` must see every recurrence of a pass, got {len(watch.calls)} for {len(states)} "
                "states. Do not compile the target, or generate without `assistant_model`."
            )
        counts = None
        if min(num_kept) < longest:
            device = states[0].device
            counts = torch.arange(longest, device=device) < torch.tensor(num_kept, device=device)[:, None]
        for call, start, end in zip(
            watch.calls, recurrence.parts(watch.states), recurrence.parts(states), strict=True
        ):
            end.copy_(recurrence.advance(call, start, longest, counts)[1])

    def restore(self) -> None:
        """Put back what there was before a pass of which nothing was kept."""
        for layer, before in zip(self.layers, self._before, strict=False):
            for name, values in before.items():
                setattr(layer, name, values)
        self._before, self._watch = [], None

    def copy_from(self, layers: Sequence[Any]) -> None:
        """Take over copies of the states in the recurrent ones of `layers`."""
        for layer, source in zip(self.layers, RecurrentStates(layers).layers, strict=True):
            for name, values in _fields(source).items():
                setattr(layer, name, values)
            layer.device, layer.dtype = source.device, source.dtype

    def select_rows(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        for states in self._tensors():
            for index, state in _present(states).items():
                states[index] = state[rows.to(state.device)]

    def append_rows(self, other: RecurrentStates) -> None:
        """Append the rows of the same model's other states."""
        for states, new in zip(self._tensors(), other._tensors(), strict=True):
            for index, state in _present(states).items():
                states[index] = torch.cat([state, new[index]])

    def _tensors(self) -> list[dict[int, Any]]:
        return [states for layer in self.layers for states in (layer.conv_states, layer.recurrent_states)]


def cached_length(cache: Any, num_new: int, mask_width: int) -> int:
    """Return how many columns `cache` holds; states do not know, but a mask longer than the `num_new` tokens does."""
    layers = cache.layers
    if any(is_recurrent_layer(layer) for layer in layers) and not any(isinstance(x, CacheLayerMixin) for x in layers):
        return max(mask_width - num_new, 0)
    return int(cache.get_seq_length())


def is_recurrent_layer(layer: Any) -> bool:
    """Return whether a layer of a cache keeps windows of convolutions, or states."""
    return hasattr(layer, "conv_states")


def _has_window(layer: Any) -> bool:
    """Return whether a layer has sliding attention beside its convolutions: both wait for a crop, or neither does."""
    return isinstance(layer, DynamicSlidingWindowLayer)


def window_behind(window: Tensor, inputs: Tensor, num_kept: Sequence[int]) -> Tensor:
    """Return the windows `(B, *, K)` behind the first `num_kept[r]` of each row's `inputs` `(B, *, T)`."""
    size, inputs = window.shape[-1], torch.cat([window, inputs], dim=-1)
    if min(num_kept) == max(num_kept):
        return inputs[..., num_kept[0] : num_kept[0] + size].clone()
    columns = torch.tensor(num_kept, device=inputs.device)[:, None] + torch.arange(size, device=inputs.device)
    return torch.take_along_dim(inputs, columns.view(len(columns), *[1] * (inputs.ndim - 2), size), dim=-1)


def _fields(layer: Any, copy: bool = True) -> Fields:
    fields = {name: dict(getattr(layer, name)) for name in _FIELDS}
    for name in _FIELDS[:2] if copy else ():
        fields[name].update({index: state.clone() for index, state in _present(fields[name]).items()})
    return fields


def _present(states: dict[int, Any]) -> dict[int, Tensor]:
    return {index: state for index, state in states.items() if state is not None}


def _states(fields: Sequence[Fields]) -> list[Tensor]:
    return [state for one in fields for state in _present(one["recurrent_states"]).values()]
