"""Which targets with recurrent layers can be taken back: known families, and others that pass a trial.

B rows, T tokens.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from dspark_hf.generation.compat import CACHE_KEY, empty_cache_like
from dspark_hf.generation.targets.recurrences import wrap_recurrences
from dspark_hf.generation.targets.recurrent import RecurrentStates, is_recurrent_layer

_GATED_DELTA = ("qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen4_exp", "olmo_hybrid", "lara_mini")
_KIMI_DELTA = ("kimi_linear", "glm5_next", "bailing_hybrid")
_MAMBA = ("mamba", "falcon_mamba", "jamba", "zamba")
_MAMBA_2 = ("mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")
# families that tests compare with plain decoding, and whether they have a state beside windows of convolutions
_KNOWN = {
    **dict.fromkeys((*_GATED_DELTA, *_KIMI_DELTA, *_MAMBA, *_MAMBA_2), True),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), False),
}
_obstacles: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


def recurrent_layers(model: PreTrainedModel) -> list[Any]:
    """Return the layers of an empty cache of `model` that hold windows or states."""
    return [layer for layer in empty_cache_like(model).layers if is_recurrent_layer(layer)]


def can_recompute(model: PreTrainedModel) -> bool:
    """Return whether `model` has recurrent layers, and all of them can be taken back."""
    return obstacle(model) is None


def can_recompute_rows(model: PreTrainedModel) -> bool:
    """Return whether this holds for rows of their own lengths: a trial is made with one, so for known families."""
    return _family(model) in _KNOWN and can_recompute(model)


def obstacle(model: PreTrainedModel) -> str | None:
    """Return why the recurrent layers of `model` cannot be taken back, None if they can."""
    if model not in _obstacles:
        _obstacles[model] = _find_obstacle(model)
    return _obstacles[model]


def _find_obstacle(model: PreTrainedModel) -> str | None:
    try:
        layers = recurrent_layers(model)
        if not layers or not all(hasattr(layer, "number_of_states") for layer in layers):
            return "it has a form of its own"
        has_recurrence = wrap_recurrences(model)
        return None if _KNOWN.get(_family(model)) == has_recurrence else _trial(model)
    except Exception as error:
        return f"a trial of the rollback ended with {type(error).__name__} ({error})"


def _family(model: PreTrainedModel) -> str:
    """Return the name of the family in Transformers, "" of a class from elsewhere."""
    module = type(model.get_decoder()).__module__.split(".")
    return module[2] if module[:2] == ["transformers", "models"] else ""


@torch.no_grad()
def _trial(model: Any) -> str | None:
    """Return what is wrong with states that were taken back, None if they are those of the kept tokens alone."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(7, 7 + 5 * 8, 5, device=model.device) % vocabulary)[None]
    cache, expected = (model(input_ids=ids[:, :4], use_cache=True).get(CACHE_KEY) for _ in range(2))
    if not isinstance(cache, Cache):
        return "it has a form of its own"
    states = RecurrentStates(cache.layers)
    cache.activate_past_recording()
    with states.watched(4, are_drafts=True):
        _go_on(model, ids, 4, 8, cache)
    if not states.are_seen:
        return "their recurrence is none of those that are known here"
    states.keep([2])
    for start in (4, 5):
        _go_on(model, ids, start, start + 1, expected)
    if all(_is_close(one, other) for one, other in zip(_tensors(cache), _tensors(expected), strict=True)):
        return None
    return "in a trial, what was taken back was not the state of the kept tokens"


def _go_on(model: Any, ids: Tensor, start: int, end: int, cache: Any) -> None:
    positions = {"position_ids": torch.arange(start, end, device=ids.device)[None]}
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    model(input_ids=ids[:, start:end], use_cache=True, **{CACHE_KEY: cache}, **(positions if takes_positions else {}))


def _tensors(cache: Any) -> list[Tensor]:
    layers = RecurrentStates(cache.layers).layers
    states = [state for layer in layers for state in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    return [state for state in states if state is not None]


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two states differ by what other orders of a sum may make of them."""
    allowed = {torch.float32: 1e-3, torch.float64: 1e-9}.get(expected.dtype, 0.1)
    return float((actual.double() - expected.double()).norm()) <= allowed * float(expected.double().norm())
