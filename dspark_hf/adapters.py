"""A target that is an adapter of PEFT: the model that it was trained on, with the adapter in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoModelForCausalLM

from dspark_hf.damage import read_object
from dspark_hf.hubs import hub_options

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BASE = "base_model_name_or_path"
# tables with a row for every token; with an adapter of its own, a table lies inside a layer
_TABLE = re.compile(r"(.*\.)?(embed_tokens|wte|embed_in|lm_head)(\.base_layer)?\.weight")


def is_adapter(target: str) -> bool:
    """Return whether a name is that of a folder that holds an adapter, and no model."""
    folder = Path(target)
    return (folder / _CONFIG).is_file() and not (folder / "config.json").exists()


def adapted_name(folder: str) -> str:
    """Return the name of the model that an adapter was trained on.

    Raises:
        ValueError: if its configuration does not say.
    """
    try:
        name = read_object(Path(folder) / _CONFIG).get(_BASE)
    except ValueError as error:
        raise ValueError(f"`{_CONFIG}` in {folder!r} {error}. Save the adapter anew.") from error
    if not isinstance(name, str) or not name:
        raise ValueError(f"`{_BASE}` must name a model in {folder!r}'s `{_CONFIG}`, got {name!r}. Fill it in.")
    return name


def load_adapted(folder: str, options: dict[str, Any]) -> Any:
    """Return the model that an adapter was trained on, with the adapter in it; `options` go to `from_pretrained`.

    Merged into the weights, unless those are quantised: then it stays beside them. The model bears the adapter's name.

    Raises:
        ValueError: without the package `peft`; if it is not known what it was trained on, or it prepends prompts.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ValueError(
            f"`peft` must be installed to read the adapter {folder!r}, got no such package. Run `pip install peft`."
        ) from error
    if getattr(PeftConfig.from_pretrained(folder), "is_prompt_learning", False):
        raise ValueError(
            f"`target` must be an adapter of a model's layers, such as LoRA's, got {folder!r}, which prepends "
            "prompts. Use the model that it was made for."
        )
    base_name = adapted_name(folder)
    base = AutoModelForCausalLM.from_pretrained(base_name, **options, **hub_options(base_name, options))
    num_tokens = _num_tokens(folder)
    if num_tokens is not None and num_tokens != base.get_input_embeddings().num_embeddings:
        # trained with new tokens, whose rows the adapter brings
        base.resize_token_embeddings(num_tokens, mean_resizing=False)
    adapted: Any = PeftModel.from_pretrained(base, folder)
    is_quantised = getattr(base, "is_quantized", False)
    model = adapted.get_base_model() if is_quantised else adapted.merge_and_unload()
    model.config.name_or_path = model.name_or_path = folder
    return model


def _num_tokens(folder: str) -> int | None:
    """Return the rows of the embedding or the head that an adapter brings along, or None."""
    path = Path(folder) / _WEIGHTS
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # no mapping
            if _TABLE.fullmatch(name):
                return tensors.get_slice(name).get_shape()[0]
    return None
