"""Load what a command names, with errors that name the option."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig

from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.deepseek_v4.configuration import RELEASED_MODEL_TYPE
from dspark_hf.modeling.deepseek_v4.modeling import DeepseekV4DSparkForCausalLM

DTYPES: Mapping[str, torch.dtype | str] = {
    "auto": "auto",
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def check_dtype(dtype: str) -> None:
    """Raise a `ValueError` unless `dtype` is a key of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}. Correct it.")


def find_device(device: str) -> torch.device:
    """Return a device; `"auto"` is the GPU if there is one.

    Raises:
        ValueError: if PyTorch cannot use it here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`--device` must be auto or a device PyTorch can use here, got {device!r}. Try cpu. ({first_line(error)})"
        ) from error
    return found


def check_folder(option: str, name: str, what: str = "causal language model") -> None:
    """Raise a `ValueError` if `name` is meant to be a folder that is not there, before a hub is asked for it.

    `AUTHOR/MODEL` may be a folder or a name on the hub: it is taken for a slip where a folder `AUTHOR` is here, with
    one in it that is called nearly so.
    """
    path = Path(name).expanduser()
    if path.exists():
        return
    is_path = path.is_absolute() or len(path.parts) > 2 or name.startswith((".", "~"))
    there = [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, there, n=1)
    is_slip = near and len(path.parts) == 2 and not isinstance(try_to_load_from_cache(name, "config.json"), str)
    if not is_path and not is_slip:
        return
    hint = f"Did you mean {str(path.parent / near[0])!r}?" if near else "Correct the path."
    hub = " For the model of that name on the hub, run `hf download` first." * (not is_path)
    raise ValueError(
        f"`{option}` must be the folder or hub name of a {what}, got {name!r}: no folder of this name is here. "
        f"{hint}{hub}"
    )


def read_drafter_config(option: str, name: str) -> DSparkConfig:
    """Return the configuration of a drafter's folder or hub name, given as `option`.

    Raises:
        ValueError: if it cannot be read.
    """
    check_folder(option, name, "DSpark drafter")
    try:
        return DSparkConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{option}` must be the folder or hub name of a DSpark drafter, got {name!r}, which cannot be read. "
            f"Correct it. ({first_line(error)})"
        ) from error


def load_tokenizer(target: str) -> Any:
    """Return the tokenizer of a folder or hub name.

    Raises:
        ValueError: if it cannot be read.
    """
    check_folder("--target", target)
    try:
        return AutoTokenizer.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--target` must be the folder or hub name of a causal language model, got {target!r}, whose tokenizer "
            f"cannot be read. Correct it. ({first_line(error)})"
        ) from error


def load_target(
    target: str, *, dtype: str = "auto", device: str = "auto", quantization: str = "none", attention: str = "auto"
) -> Any:
    """Return the model of a folder or hub name, in evaluation mode.

    DeepSeek-V4 is loaded as a `DeepseekV4DSparkForCausalLM`, which a drafter can assist.

    Args:
        target: folder or hub name.
        dtype: a key of `DTYPES`.
        device: where it goes; `"auto"` is the GPU if there is one.
        quantization: `"none"`, or bitsandbytes' `"8bit"` or `"4bit"`; the output head is left out of it, since
            training reads its rows.
        attention: Transformers' name of an attention implementation; `"auto"` is the one it chooses.

    Raises:
        ValueError: if the dtype, the device, the attention implementation or the target is not there.
    """
    check_dtype(dtype)
    check_folder("--target", target)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "device_map": {"": find_device(device)}}
    if attention != "auto":
        options["attn_implementation"] = attention
    if quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit",
            load_in_4bit=quantization == "4bit",
            llm_int8_skip_modules=["lm_head"],
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        fields, _ = PreTrainedConfig.get_config_dict(target)
        is_deepseek_v4 = fields.get("model_type") == RELEASED_MODEL_TYPE
        model_class: Any = DeepseekV4DSparkForCausalLM if is_deepseek_v4 else AutoModelForCausalLM
        return model_class.from_pretrained(target, **options).eval()
    except OSError as error:
        raise ValueError(
            f"`--target` must be the folder or hub name of a causal language model, got {target!r}, which cannot be "
            f"read. Correct it. ({first_line(error)})"
        ) from error
    except (ImportError, ValueError) as error:
        if attention == "auto":
            raise
        raise ValueError(
            f"`--attention` must be one that the target can use here, got {attention!r}. Try auto. "
            f"({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [""])[0]
