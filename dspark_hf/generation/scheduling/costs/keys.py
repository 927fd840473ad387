"""Keys under which costs are kept: they name what the costs of a target or a drafter depend on."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dspark_hf.generation.compat import attention_implementation
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.packing import multiplies_packed
from dspark_hf.generation.scheduling.costs.storing import ProfileKey
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.provenance import processor_name

# numbers and lists in a configuration whose names contain one of these do not change the time of a pass: token ids,
# the number of positions, rotary embeddings
_WITHOUT_COST = ("architectures", "label2id", "token_id", "position", "rope_")

# How many weights every call checks, to notice replaced layers. Checking all would take a third of a second for
# DeepSeek-V4-Flash, and quantising a model replaces most of them.
_NUM_WATCHED = 64

# the class, the dtype and the size of a weight
_Weight = tuple[str, torch.dtype, torch.Size]

# a model's weights by name, as they were when its fingerprint was taken
_Watched = dict[str, _Weight]

_FINGERPRINTS: WeakKeyDictionary[Any, tuple[_Watched, str]] = WeakKeyDictionary()


def profile_key(target: TargetAdapter) -> ProfileKey:
    """Return what the target's costs depend on."""
    model = target.model
    return ProfileKey(
        model=f"{type(model).__name__}-{_fingerprint(model)}",
        dtype=str(model.dtype).removeprefix("torch."),
        device=_device_name(model),
        attention=attention_implementation(model),
    )


def drafter_key(drafter: Drafter) -> str:
    """Return what a drafter's costs depend on, besides the target's key."""
    dtype = str(getattr(drafter, "dtype", "")).removeprefix("torch.")
    device = "" if getattr(drafter, "device", None) is None else _device_name(drafter)
    return "-".join(filter(None, (type(drafter).__name__, _fingerprint(drafter), dtype, device)))


def _fingerprint(model: Any) -> str:
    """Return a short text that is the same for models whose passes do the same work."""
    known = _FINGERPRINTS.get(model)
    # layers may have been replaced since, for example by quantising
    if known is None or not _still_has(model, known[0]):
        weights = _weights(model)
        watched = dict(list(weights.items())[:: math.ceil(len(weights) / _NUM_WATCHED) or 1])
        known = _FINGERPRINTS[model] = watched, _hash_shape(model, weights)
    return known[1]


def _weights(model: Any) -> _Watched:
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    return {name: _describe(weight) for name, weight in named}


def _still_has(model: Any, weights: _Watched) -> bool:
    try:
        return all(_describe(model.get_parameter(name)) == weight for name, weight in weights.items())
    except AttributeError:
        return False


def _describe(weight: Tensor) -> _Weight:
    return type(weight).__name__, weight.dtype, weight.shape


def _hash_shape(model: Any, weights: _Watched) -> str:
    config = getattr(model, "config", None)
    fields = {} if config is None else _shaping(config.to_dict())
    modules = Counter(type(module).__name__ for module in (model.modules() if isinstance(model, nn.Module) else ()))
    kinds = sorted(map(str, [*modules.items(), *Counter(weights.values()).items()]))
    return hashlib.sha256(json.dumps([fields, kinds], sort_keys=True).encode()).hexdigest()[:10]


def _shaping(value: Any) -> Any:
    """Return what shapes a pass but shows in no module: whole numbers, such as heads or a window, and layer kinds."""
    if isinstance(value, dict):
        named = {str(name): _shaping(field) for name, field in value.items()}
        return {
            name: field for name, field in named.items() if field not in (None, [], {}) and not _is_without_cost(name)
        }
    if isinstance(value, (list, tuple)):
        # lists may hold names, as of layer kinds; a name that stands alone chooses modules, which are looked at anyway
        kept = [item if isinstance(item, str) else _shaping(item) for item in value]
        return [item for item in kept if item is not None]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_without_cost(name: str) -> bool:
    return name.startswith("_") or any(part in name for part in _WITHOUT_COST)


def _device_name(model: Any) -> str:
    names = Counter(map(_place_name, places(model)))
    found = " and ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())
    return f"{found}, packed weights" if multiplies_packed(model) else found


def places(model: Any) -> list[str]:
    """Return where a model's layers lie: devices, and other memory such as a disk."""
    # accelerate may have spread the layers, also over memory that they are loaded from when needed
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    return sorted(places) if len(places) > 1 else [str(model.device)]


def _place_name(place: str) -> str:
    kind = "cuda" if place.isdigit() else place.split(":")[0]
    if kind == "cuda":
        return torch.cuda.get_device_name(int(place) if place.isdigit() else torch.device(place))
    return f"{processor_name()}, {torch.get_num_threads()} threads" if kind == "cpu" else kind
