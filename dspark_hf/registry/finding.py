"""Drafters by name, for one target: found, loaded once, and kept as long as the target is."""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel
from transformers.utils import logging

from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.lookup_assistant import LookupAssistant
from dspark_hf.generation.targets.adapter import TargetAdapter, input_device
from dspark_hf.generation.wrappers import unwrap
from dspark_hf.hubs import is_elsewhere
from dspark_hf.loading import is_drafter, load_assistant, read_drafter_config
from dspark_hf.modeling.deepseek_v4.modeling import DeepseekV4DSparkForCausalLM
from dspark_hf.modeling.provenance import target_fields
from dspark_hf.registry.entries import DrafterEntry, add_entry, known_drafters, own_place
from dspark_hf.registry.matching import find_entry, target_name

AUTO = "auto"
_OPTION = "assistant_model"
_LOGGER = logging.get_logger(__name__)
# assistants by name and dtype, and what `AUTO` stands for: both go with the target
_LOADED: WeakKeyDictionary[PreTrainedModel, dict[tuple[str, torch.dtype], Any]] = WeakKeyDictionary()
_CHOSEN: WeakKeyDictionary[PreTrainedModel, DrafterEntry | LookupAssistant] = WeakKeyDictionary()
# two threads would otherwise load a drafter twice
_LOCK = threading.RLock()


def load_drafter_for(target: PreTrainedModel, *, lookup: bool = True) -> Drafter:
    """Return the drafter that is known for `target`, on its device and in its dtype.

    It is found by the target's fingerprint or name among the user's own drafters (`register_drafter`, and the folder
    or file that `DSPARK_HF_DRAFTERS` names) and those that the package knows, and kept as long as the target is: the
    second call gives the same object. DeepSeek-V4 brings its own. `generate(assistant_model="auto")` calls this.

    A drafter that has to be downloaded is named in a warning before.

    Args:
        target: the model that is to be assisted.
        lookup: whether a `LookupAssistant` is returned, with a warning, where no drafter is known.

    Raises:
        ValueError: if the drafter cannot be read, or does not fit; or if there is none and `lookup` is False.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from dspark_hf import load_drafter_for
        >>> target = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=4))
        >>> type(load_drafter_for(target)).__name__
        'LookupAssistant'
    """
    target = unwrap(target)
    if isinstance(target, DeepseekV4DSparkForCausalLM) and target.config.has_dspark and target.name_or_path:
        return target.dspark
    with _LOCK:
        chosen = _CHOSEN.get(target)
        if chosen is None:
            chosen = _CHOSEN[target] = find_entry(target, known_drafters()) or LookupAssistant()
            if isinstance(chosen, LookupAssistant) and lookup:
                _LOGGER.warning(_nothing_known(target) + " Drafts are looked up in the text instead.")
        if isinstance(chosen, LookupAssistant):
            if not lookup:
                raise ValueError(f"`target` must have a drafter that is known. {_nothing_known(target)}")
            return chosen
        return _load_entry(chosen, target)


def _nothing_known(target: PreTrainedModel) -> str:
    return (
        f"No drafter is known for {target_name(target) or f'this {type(target).__name__}'}: name one with "
        f"`dspark_hf.register_drafter(drafter, target)` (it goes into {str(own_place())!r}), or make one with "
        "`DSparkAssistantModel.from_target`."
    )


def _load_entry(entry: DrafterEntry, target: PreTrainedModel) -> Drafter:
    if not _is_here(entry.drafter):
        _LOGGER.warning_once(
            f"`assistant_model`: fetching the drafter {entry.drafter!r} for {entry.target} (named in {entry.origin})."
        )
    try:
        drafter = assistant_named(entry.drafter, target)
        if not isinstance(drafter, Drafter):
            raise ValueError(f"`drafter` must be a DSpark drafter, got a {type(drafter).__name__}.")
        drafter.check_target(TargetAdapter(target))
    except ValueError as error:
        raise ValueError(
            f'`assistant_model="auto"` must lead to a drafter that can be used, got {entry.drafter!r} for '
            f"{entry.target or 'this target'}, named in {entry.origin!r}. Mend that, fetch it with `hf download`, or "
            f"pass `assistant_model=dspark_hf.LookupAssistant()`. ({error})"
        ) from error
    return drafter


def _is_here(name: str) -> bool:
    if os.path.isdir(name):
        return True
    return not is_elsewhere(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)


def assistant_named(name: str, target: PreTrainedModel, *, only_drafters: bool = False) -> Any:
    """Return the assistant of a name: `"auto"`, a folder or a hub name, on the target's device and in its dtype.

    It is loaded once and kept as long as the target. A DSpark drafter comes in any layout that is read; any other
    causal language model is returned as Transformers' own assistants are, or with `only_drafters` None.

    Raises:
        ValueError: if it cannot be read; the message names it.
    """
    target = unwrap(target)
    if name == AUTO:
        return load_drafter_for(target)
    dtype = target.dtype if target.dtype.is_floating_point else torch.float32
    with _LOCK:
        loaded = _LOADED.setdefault(target, {})
        if (name, dtype) not in loaded:
            if only_drafters and not is_drafter(name, _OPTION):
                return None
            loaded[name, dtype] = load_assistant(name, _OPTION, dtype=dtype)
        assistant = loaded[name, dtype]
        device = input_device(target)
        # a target may have moved since
        return assistant if assistant.device == device else assistant.to(device)


def register_drafter(drafter: str | os.PathLike[str], target: PreTrainedModel | str | None = None) -> DrafterEntry:
    """Let `load_drafter_for` and `assistant_model="auto"` find a drafter of yours from now on.

    The entry is written to `drafters.json` in the folder that `DSPARK_HF_DRAFTERS` names (or to the file that it
    names), by default in `HF_HOME`, and goes before what the package knows.

    Args:
        drafter: folder or hub name.
        target: the target, or its hub name or folder; default what the drafter's configuration says.

    Returns:
        The entry.

    Raises:
        ValueError: if the folder is none, or the drafter does not say whose it is and `target` is None.
    """
    name = str(drafter)
    if os.path.isdir(os.path.expanduser(name)):
        name = str(os.path.abspath(os.path.expanduser(name)))
    whose: dict[str, str | None]
    if isinstance(target, str):
        whose = {"base_model_name_or_path": target, "target_fingerprint": None}
    elif target is not None:
        whose = target_fields(TargetAdapter(unwrap(target)))
        whose["base_model_name_or_path"] = target_name(unwrap(target)) or None
    else:
        config = read_drafter_config(name, "drafter")
        whose = {field: getattr(config, field) for field in ("base_model_name_or_path", "target_fingerprint")}
    print_ = whose["target_fingerprint"]
    made_for = whose["base_model_name_or_path"] or (f"fingerprint {print_}" if print_ else None)
    if made_for is None:
        raise ValueError(
            f"`target` must be given for a drafter that does not say whose it is, got None for {name!r}. Pass the "
            "target, or its name."
        )
    entry = DrafterEntry(made_for, name, print_)
    file = add_entry(entry)
    with _LOCK:
        _CHOSEN.clear()
    return DrafterEntry(made_for, name, print_, str(file))
