"""Whether a compiled pass can hand out what a drafter reads: a model's own hidden states, since hooks are not run."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.utils import logging

from dspark_hf.generation.targets.adapter import TargetAdapter

_LOGGER = logging.get_logger(__name__)
# by model, and the layers that were asked for
_KNOWN: WeakKeyDictionary[Any, dict[tuple[int, ...], bool]] = WeakKeyDictionary()


def can_tap_outputs(adapter: TargetAdapter) -> bool:
    """Return whether the target's `output_hidden_states` are what its hooks see, found out by a pass over one token.

    The pass also lets Transformers install the hooks of its own, which it cannot while it compiles. Where they differ,
    as behind the last layer, whose output is given normed, a warning says that nothing is compiled.
    """
    if not adapter.layer_ids:
        return True
    answers = _KNOWN.setdefault(adapter.model, {})
    layer_ids = tuple(adapter.layer_ids)
    if layer_ids not in answers:
        answers[layer_ids] = _compare(adapter)
    if not answers[layer_ids]:
        _LOGGER.warning_once(
            f"`target_layer_ids` {list(layer_ids)} of the drafter are not all among the hidden states that "
            f"{type(adapter.model).__name__} returns: its passes will not be compiled."
        )
    return answers[layer_ids]


def _compare(adapter: TargetAdapter) -> bool:
    model: Any = adapter.model
    token = torch.zeros(1, 1, dtype=torch.long, device=adapter.device)
    outputs = model(input_ids=token, use_cache=False, output_hidden_states=True, return_dict=True)
    seen = adapter.pop_context_hidden_states()
    states = outputs.get("hidden_states")
    if states is None or len(states) != adapter.num_layers + 1:
        return False
    given = adapter.select_context(states, token)
    return given.shape == seen.shape and torch.equal(given, seen)
