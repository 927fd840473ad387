"""Loading and saving of DeepSeek-V4: released checkpoints, and folders that we saved."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from dspark_hf.modeling.deepseek_v4.checkpoints.loading import (
    Checkpoint,
    is_fp32,
    official_name,
    parse_dtype,
    prepare,
    read_weights,
)
from dspark_hf.modeling.deepseek_v4.checkpoints.placing import Device, DeviceMap, dispatch, fill, resolve_device_map
from dspark_hf.modeling.deepseek_v4.checkpoints.saving import (
    CONFIG_NAME,
    model_savings,
    replace_files,
    stored_savings,
    write_json,
    write_weights,
)
from dspark_hf.modeling.deepseek_v4.configuration import DeepseekV4DSparkConfig
from dspark_hf.modeling.formats.deepseek_v4 import PREFIX, is_for_images, is_released, reads_images
from dspark_hf.modeling.formats.tensors import HUB_OPTIONS, TensorInfo, read_index, read_names

# what Transformers' classes and pipelines pass and is of no use here: one format, one way to attend
_IGNORED = (
    "_commit_hash",
    "_from_auto",
    "adapter_kwargs",
    "attn_implementation",
    "code_revision",
    "low_cpu_mem_usage",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
)
# what bitsandbytes must leave alone, by the ends of names: layers that run in fp32 or are in no release quantised, and
# grouped ones, which it takes for ordinary
_NEVER_QUANTIZED = ("head", "compressor.wkv", "compressor.wgate", "indexer.weights_proj", "wo_a")


@dataclass
class Origin:
    """What a loaded model remembers of its checkpoint, to save it in the same form."""

    is_released: bool
    # by official name; of weights that are held in another dtype
    stored_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    # where the tensors are that are none of the model's own
    source: str | None = None
    # where weights are read from while the model runs
    offloaded_to: set[Path] = field(default_factory=set)
    has_dequantized: bool = False


class ReleasedCheckpoints(PreTrainedModel):
    """A model that loads and saves checkpoints with the released names and number formats."""

    _origin: Origin | None = None
    # where in the hub or below the folder the checkpoint is, for what is read from it later
    _hub_options: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def from_pretrained(  # type: ignore[override]  # fewer ways to load, all by name
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *,
        config: DeepseekV4DSparkConfig | str | os.PathLike | None = None,
        dtype: torch.dtype | str | None = None,
        keep_quantized: bool | None = None,
        device_map: str | Device | DeviceMap | None = None,
        offload_folder: str | os.PathLike | None = None,
        max_memory: dict[Any, Any] | None = None,
        quantization_config: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the model of a folder or hub name, in evaluation mode.

        Weights are read one by one to where they belong, never all at once. On the CPU, those that need no other dtype
        are views of the mapped files.

        Args:
            pretrained_model_name_or_path: a released checkpoint or what `save_pretrained` wrote; None: as
                `PreTrainedModel.from_pretrained`, with `config` and `state_dict`.
            config: the configuration, or where it is; default: the checkpoint's own.
            dtype: of floating-point weights; router, hyper-connections, compressor, sinks and head are in fp32 with
                any. Default, and `"auto"`: as stored, bf16 in the releases.
            keep_quantized: whether weights in FP8 and FP4 stay as they are and are dequantised for every product.
                Default: unless `dtype` or `quantization_config` is given.
            device_map: `"auto"`, `"balanced"`, `"balanced_low_0"` or `"sequential"`, a device, or a device for every
                part by name, `"disk"` among them. Default: all on the CPU.
            offload_folder: for dequantised weights on disk; those that are kept are read from the checkpoint.
            max_memory: bytes for every device, with `device_map="auto"` and its kind.
            quantization_config: a `BitsAndBytesConfig`: weights are dequantised in memory, and Transformers quantises
                them anew.
            output_loading_info: whether to return a pair, the model and a dict of what went wrong: always nothing.
            kwargs: hub options as in Transformers, and fields of the configuration to change.

        Raises:
            ValueError: if tensors are missing, unexpected or of another size, or arguments do not go together.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(
                None,
                config=config,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization_config,
                **kwargs,
            )
        kwargs = {name: value for name, value in kwargs.items() if name not in _IGNORED}
        dtype = parse_dtype(kwargs.pop("torch_dtype", None) if dtype is None else dtype)
        hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        config = _load_config(pretrained_model_name_or_path, config, hub_options, kwargs)
        checkpoint = Checkpoint.read(pretrained_model_name_or_path, _is_not_ours(config), **hub_options)
        if keep_quantized is None:
            keep_quantized = dtype is None and quantization_config is None
        elif keep_quantized and quantization_config is not None:
            raise ValueError(
                "`keep_quantized` must be left out beside `quantization_config`, got True. Weights are quantised in "
                "one way only."
            )
        config.dtype = dtype or checkpoint.plain_dtype
        config.name_or_path = str(pretrained_model_name_or_path)
        with torch.device("meta"):
            model = cls(config)
        loadings = prepare(model, checkpoint, dtype=dtype, is_kept=keep_quantized)
        if quantization_config is not None:
            state_dict = {loading.own: tensor for loading, tensor in read_weights(checkpoint, loadings)}
            model = super().from_pretrained(
                None,
                config=config,
                dtype=config.dtype,
                state_dict=state_dict,
                device_map=device_map,
                max_memory=max_memory,
                quantization_config=_without_fp32(quantization_config),
            )
        else:
            devices = resolve_device_map(model, device_map, max_memory)
            offload = fill(model, checkpoint, loadings, devices, offload_folder)
            if device_map is not None:
                dispatch(model, devices, offload)
            model._origin = Origin(
                is_released=_is_released(pretrained_model_name_or_path, hub_options),
                stored_dtypes=_stored_dtypes(model, checkpoint, dtype),
                source=_lasting(pretrained_model_name_or_path),
                offloaded_to={file.parent for file in offload.files},
                has_dequantized=any(loading.is_dequantized for loading in loadings.values()),
            )
        _load_generation_config(model, pretrained_model_name_or_path, hub_options)
        # what was fetched anew is not fetched once more
        model._hub_options = {name: value for name, value in hub_options.items() if name != "force_download"}
        model.eval()
        nothing: dict[str, Any] = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), set())
        return (model, {**nothing, "error_msgs": []}) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]  # further arguments of Transformers have no meaning here
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *,
        max_shard_size: int | str = "5GB",
        released: bool | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save configuration and weights under the released names; what was loaded as stored is saved bit for bit.

        Tensors that are none of the target's, such as the DSpark module's `mtp.*`, are copied from the checkpoint that
        the model was loaded from. The folder is as before if saving fails.

        Args:
            save_directory: a folder; its other files stay.
            is_main_process: whether to save anything.
            state_dict: weights to save instead of the model's own.
            max_shard_size: size of a file, such as `"5GB"`.
            released: whether `config.json` is in the released form. Default: if it was loaded from that form.
            push_to_hub: not here.

        Raises:
            ValueError: if `push_to_hub` is set, if `quantization_config` changed the model, or if its weights are read
                from this folder while it runs.
        """
        if push_to_hub:
            raise ValueError(
                "`push_to_hub` must be false, got True. Call `model.push_to_hub(name)`, which saves and uploads."
            )
        if getattr(self, "hf_quantizer", None) is not None:
            raise ValueError(
                "`save_pretrained` must be called on a model in the released formats or in floating point, got one "
                "that `quantization_config` changed. Keep the checkpoint, and quantise whenever it is loaded."
            )
        if not is_main_process:
            return
        folder = Path(save_directory).absolute()
        origin = self._origin or Origin(is_released=False)
        if folder in origin.offloaded_to:
            raise ValueError(
                f"`save_directory` must be another folder than that of weights on disk, got {str(folder)!r}. Save "
                "elsewhere, or load without offloading."
            )
        savings = [*model_savings(self, state_dict, origin.stored_dtypes), *stored_savings(self._tensors_of_others())]
        max_bytes = convert_file_size_to_int(max_shard_size)

        def write(workspace: Path) -> None:
            write_weights(workspace, savings, max_bytes)
            self._save_configs(workspace, origin, origin.is_released if released is None else released)

        replace_files(folder, write)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy weights in, by the model's own names or, as a trainer reads them from files, by official ones."""
        own_names = {official_name(own): own for own in self.state_dict()}
        renamed = {own_names.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, strict=strict, assign=assign)

    def _tensors_of_others(self) -> dict[str, TensorInfo]:
        """Return the tensors of the model's checkpoint that are none of its own, to be saved beside them."""
        source = None if self._origin is None else self._origin.source
        if source is None:
            return {}
        is_not_ours = _is_not_ours(self.config)
        if not any(is_not_ours(name) for name in read_names(source, **self._hub_options)):
            return {}
        return read_index(source, is_left_out=lambda name: not is_not_ours(name), **self._hub_options)

    def _save_configs(self, folder: Path, origin: Origin, is_released: bool) -> None:
        config: Any = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        if origin.has_dequantized:
            config.stored_quantization, config.expert_dtype = None, None
        if is_released:
            write_json(folder / CONFIG_NAME, config.to_released_dict())
        else:
            config.save_pretrained(folder)
        if self.can_generate() and self.generation_config is not None:
            self.generation_config.save_pretrained(folder)


def _is_not_ours(config: PreTrainedConfig) -> Callable[[str], bool]:
    """Return which tensors of a checkpoint with this configuration are not the target's: its drafter's, of images."""
    has_images = reads_images(vars(config))
    return lambda name: name.startswith(PREFIX) or (has_images and is_for_images(name))


def _lasting(name: str | os.PathLike) -> str:
    """Return a folder or hub name that means the same from any working directory."""
    return str(Path(name).absolute() if Path(name).is_dir() else name)


def _load_config(
    name: str | os.PathLike, config: Any, hub_options: Mapping[str, Any], changes: dict[str, Any]
) -> DeepseekV4DSparkConfig:
    """Return the configuration with its changes.

    Raises:
        ValueError: if a change is to no field, or breaks a rule.
    """
    if isinstance(config, DeepseekV4DSparkConfig):
        loaded = copy.deepcopy(config)
        unknown = {field: value for field, value in changes.items() if not hasattr(loaded, field)}
        for field_name, value in changes.items():
            setattr(loaded, field_name, value)
    else:
        source = name if config is None else config
        loaded, unknown = DeepseekV4DSparkConfig.from_pretrained(
            source, return_unused_kwargs=True, **hub_options, **changes
        )
    if unknown:
        raise ValueError(
            f"`kwargs` must be options of `from_pretrained` or fields, got {sorted(unknown)}. Remove them."
        )
    loaded.check()
    return loaded


def _is_released(name: str | os.PathLike, hub_options: Mapping[str, Any]) -> bool:
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name, **hub_options)
    except OSError:
        # weights alone, beside a configuration of the caller's
        return False
    return is_released(fields)


def _stored_dtypes(
    model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Return the dtypes of weights that are in fp32 only since the model computes with them so."""
    if dtype == torch.float32:
        return {}
    infos = checkpoint.target.items()
    return {name: info.dtype for name, info in infos if is_fp32(model, name) and info.dtype.is_floating_point}


def _without_fp32(quantization_config: Any) -> Any:
    """Return bitsandbytes' settings that leave the layers alone which it must not touch."""
    changed = copy.deepcopy(quantization_config)
    if not hasattr(changed, "llm_int8_skip_modules"):
        raise ValueError(
            f"`quantization_config` must be a BitsAndBytesConfig, got {type(changed).__name__}. Other methods need a "
            "checkpoint that is stored their way."
        )
    changed.llm_int8_skip_modules = [*(changed.llm_int8_skip_modules or ()), *_NEVER_QUANTIZED]
    return changed


def _load_generation_config(model: PreTrainedModel, name: str | os.PathLike, hub_options: Mapping[str, Any]) -> None:
    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(name, **hub_options)
    except OSError:
        # there is none: the one made from the configuration stays
        return
