"""Load what a command names, with errors that name the option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig

from dspark_hf.adapters import adapted_name, is_adapter, load_adapted
from dspark_hf.damage import first_line, index_files, read_object, weights_damage
from dspark_hf.hubs import hub_options, local_name
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.deepseek_v4.configuration import RELEASED_MODEL_TYPE
from dspark_hf.modeling.deepseek_v4.modeling import DeepseekV4DSparkForCausalLM
from dspark_hf.modeling.formats import gguf
from dspark_hf.modeling.formats.choosing import find_packaging
from dspark_hf.modeling.formats.deepseek_v4 import is_released
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel

__all__ = ["load_drafter", "load_target", "load_tokenizer", "read_drafter_config"]

DTYPES: Mapping[str, torch.dtype | str] = {
    "auto": "auto",
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TARGET = "the folder or hub name of a causal language model"
_DRAFTER = "the folder or hub name of a DSpark drafter"
_ASSISTANT = "the folder or hub name of a drafter, or of another causal language model"


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


def load_tokenizer(target: str, option: str = "--target") -> Any:
    """Return the tokenizer of a folder or hub name; that of the model it adapts, if an adapter brings none.

    Raises:
        ValueError: if it cannot be read; the message names `option`.
    """
    target = local_name(target)
    with _named(option, _TARGET, target):
        if is_adapter(target) and not (Path(target) / "tokenizer_config.json").exists():
            target = adapted_name(target)
        return AutoTokenizer.from_pretrained(target, **hub_options(target, {}, "tokenizer_config.json"))


def read_drafter_config(drafter: str, option: str = "--drafter") -> DSparkConfig:
    """Return the configuration of a drafter's folder or hub name.

    Raises:
        ValueError: if it cannot be read, or is none of a DSpark drafter; the message names `option`.
    """
    drafter = local_name(drafter)
    with _named(option, _DRAFTER, drafter):
        return DSparkConfig.from_pretrained(drafter)


def check_num_drafts(num_drafts: int | None, block_size: int, drafter: str) -> None:
    """Raise a `ValueError` if `--num-drafts` is more than a drafter proposes; `drafter` is what the user calls it."""
    if num_drafts is not None and num_drafts > block_size:
        raise ValueError(
            f"`--num-drafts` must lie in [1, {block_size}] for {drafter} (its block_size), got {num_drafts}. "
            "Lower it, or leave it out."
        )


def load_drafter(drafter: str, option: str = "--drafter", **options: Any) -> DSparkAssistantModel:
    """Return the drafter of a folder or hub name, in evaluation mode; `options` go to `from_pretrained`.

    Raises:
        ValueError: if it cannot be read, or is no DSpark drafter; the message names `option`.
    """
    drafter = local_name(drafter)
    with _named(option, _DRAFTER, drafter):
        return DSparkAssistantModel.from_pretrained(drafter, **options).eval()


def load_assistant(name: str, option: str, **options: Any) -> Any:
    """Return the drafter of a folder or hub name, or any other causal language model, in evaluation mode.

    `options` go to `from_pretrained`.

    Raises:
        ValueError: if it cannot be read; the message names `option`.
    """
    name = local_name(name)
    model_class: Any = DSparkAssistantModel if is_drafter(name, option) else AutoModelForCausalLM
    with _named(option, _ASSISTANT, name):
        return model_class.from_pretrained(name, **options, **hub_options(name, options)).eval()


def is_drafter(name: str, option: str) -> bool:
    """Return whether a folder or hub name holds a DSpark drafter, in a layout that is read.

    Raises:
        ValueError: if its configuration cannot be read; the message names `option`.
    """
    name = local_name(name)
    with _named(option, _ASSISTANT, name):
        if gguf.find_file(name, {}) is not None:
            return True
        fields, _ = PreTrainedConfig.get_config_dict(name, **hub_options(name, {}))
        is_ours = fields.get("model_type") == DSparkConfig.model_type or is_released(fields)
        return is_ours or find_packaging(fields) is not None


def load_target(
    target: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str = "none",
    attention: str = "auto",
    option: str = "--target",
) -> Any:
    """Return the model of a folder or hub name, in evaluation mode.

    DeepSeek-V4 is loaded as a `DeepseekV4DSparkForCausalLM`, which a drafter can assist. Of a folder of PEFT, such as
    LoRA's, the model that it adapts is loaded, and the adapter merged into its weights unless they are quantised.

    Args:
        target: folder or hub name.
        dtype: a key of `DTYPES`.
        device: where it goes; `"auto"` is the GPU if there is one.
        quantization: `"none"`, or bitsandbytes' `"8bit"` or `"4bit"`; the output head is left out of it, since
            training reads its rows.
        attention: Transformers' name of an attention implementation; `"auto"` is the one it chooses.
        option: what the user calls the target, for errors.

    Raises:
        ValueError: if the dtype, the device, the attention implementation or the target is not there.
    """
    check_dtype(dtype)
    target = local_name(target)
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
        with _named(option, _TARGET, target):
            if is_adapter(target):
                return load_adapted(target, options).eval()
            within_reach = hub_options(target, {})
            fields, _ = PreTrainedConfig.get_config_dict(target, **within_reach)
            is_deepseek_v4 = fields.get("model_type") == RELEASED_MODEL_TYPE
            model_class: Any = DeepseekV4DSparkForCausalLM if is_deepseek_v4 else AutoModelForCausalLM
            return model_class.from_pretrained(target, **options, **within_reach).eval()
    except (ImportError, ValueError) as error:
        if attention == "auto" or isinstance(error.__cause__, OSError):
            raise
        raise ValueError(
            f"`--attention` must be one that the target can use here, got {attention!r}. Try auto. "
            f"({first_line(error.__cause__ or error)})"
        ) from error


@contextmanager
def _named(option: str, what: str, name: str) -> Iterator[None]:
    """Let errors in reading a model say what the user calls it."""
    check_slip(name, option, what)
    check_folder(name, option)
    try:
        yield
    # the libraries that read a model's files raise anything where those are damaged, `Exception` itself included
    except Exception as error:
        message = str(error)
        # our own messages say what to do, unless they name an argument that no user of a command has given, or a field
        # without its file
        is_own = message.startswith("`") and not message.startswith("`pretrained_model_name_or_path`")
        is_own = is_own and name in message
        if is_own or not is_damage(error):
            raise
        raise ValueError(
            f"`{option}` must be {what}, got {name!r}, which cannot be read. Correct it. ({first_line(error)})"
        ) from error


def is_damage(error: Exception) -> bool:
    """Return whether an error in reading files may come from the files, rather than from what is missing here."""
    is_out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
    return not is_out_of_memory and not isinstance(error, ImportError)


def check_slip(name: str, option: str, what: str = _TARGET) -> None:
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
    raise ValueError(f"`{option}` must be {what}, got {name!r}: no folder of this name is here. {hint}{hub}")


def check_folder(name: str, option: str) -> None:
    """Raise a `ValueError` that names the file if `name` is a folder with damaged configurations or weights.

    Libraries that read them name no file, follow an index wherever it leads, and wait for pipes.
    """
    folder = Path(name)
    try:
        if not folder.is_dir():
            return
        index = folder / _INDEX
        files = {file for file in (folder / name for name in _CONFIGS) if _is_there(file)}
        weights = index_files(index) if _is_there(index) else [_WEIGHTS] if _is_there(folder / _WEIGHTS) else []
    except (OSError, ValueError) as error:
        raise _damaged(option, folder / _INDEX, str(error)) from error
    for file in sorted(files):
        try:
            read_object(file)
        except ValueError as error:
            raise _damaged(option, file, str(error)) from error
    for file in (folder / name for name in weights):
        if (damage := weights_damage(file)) is not None:
            raise _damaged(option, file, damage)


def _is_there(path: Path) -> bool:
    # a link that leads nowhere is there, too
    return path.exists() or path.is_symlink()


def _damaged(option: str, file: Path, damage: str) -> ValueError:
    return ValueError(
        f"`{option}` must be a folder of whole files, got {str(file)!r}, which {damage}. Fetch it again."
    )
