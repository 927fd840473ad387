"""llama.cpp's file of a drafter: fields and tensors in one GGUF, quantised or not.

Its architecture is `dflash`, with a Markov and a confidence head for DSpark. Layers are Qwen 3's. What is quantised is
read as the plain weights that it stands for. The package `gguf` is imported where it is used (extra `gguf`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.hub import cached_file

from dspark_hf.modeling.formats.reading import Unreadable, check_context_width, common_fields
from dspark_hf.modeling.formats.tensors import known_options

NAME = "llama.cpp"
OPTION = "gguf_file"
_SUFFIX = ".gguf"
_ARCHITECTURES = ("dflash", "dspark")
_TENSORS = {
    "token_embd.weight": "embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "fc.weight": "fc.weight",
    "enc.output_norm.weight": "hidden_norm.weight",
    "output_norm.weight": "norm.weight",
    "markov_w1.weight": "markov_head.markov_w1.weight",
    "markov_w2.weight": "markov_head.markov_w2.weight",
    "conf_proj.weight": "confidence_head.proj.weight",
    "conf_proj.bias": "confidence_head.proj.bias",
    "d2t": "d2t",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# what is read, or says what tensors say; another field may change what the drafter does
_FIELDS = (
    "block_count",
    "block_size",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.causal",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "target_layers",
    "sample_from_anchor",
    "vocab_size",
    "markov_rank",
    "markov_head_type",
)
_ROPE_NUMBERS = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}


def find_file(name_or_path: str | os.PathLike, options: Mapping[str, Any]) -> Path | None:
    """Return the GGUF file that is meant: `gguf_file` of the options, or the path itself; None if none is.

    Raises:
        ValueError: if the file that is named is not there.
    """
    name = options.get(OPTION)
    if name is None:
        path = Path(name_or_path)
        return path if path.suffix == _SUFFIX and path.is_file() else None
    if not str(name).endswith(_SUFFIX):
        raise ValueError(f"`{OPTION}` must end with {_SUFFIX}, got {name!r}. Correct the name.")
    try:
        return Path(str(cached_file(name_or_path, name, **known_options(options))))
    except OSError as error:
        raise ValueError(
            f"`{OPTION}` must be a file of {str(name_or_path)!r}, got {name!r}. Correct the name."
        ) from error


def translate(file: Path) -> dict[str, Any]:
    """Return `DSparkConfig`'s fields for the drafter in a file.

    Raises:
        ValueError: if it is damaged, holds another model, or asks for something that is not supported.
    """
    reader = _open(file)
    fields = _described(reader)
    shapes = {ours: _shape(tensor) for tensor in reader.tensors for ours in [_our_name(tensor.name)]}
    slots, is_markov = _need(fields, "block_size"), "markov_head.markov_w1.weight" in shapes
    # without the field a block of DFlash drafts nothing at its anchor, one with a Markov head does
    drafts_at_anchor = bool(fields.get("sample_from_anchor", is_markov))
    common = common_fields(
        {
            "rms_norm_eps": _need(fields, "attention.layer_norm_rms_epsilon"),
            "head_dim": fields.get("attention.key_length"),
            "max_position_embeddings": fields.get("context_length"),
            "vocab_size": fields.get("vocab_size") or _num_tokens(reader),
            "dtype": _dtype(reader),
            "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
            "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
            "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
        },
        shapes,
        NAME,
    )
    mask = _value(reader, "tokenizer.ggml.mask_token_id")
    if mask is None:
        raise _unreadable("say `tokenizer.ggml.mask_token_id`", "none")
    translated = {
        **common,
        "rope_parameters": _rope(fields, common["head_dim"]),
        "borrows_bare_weights": True,
        "block_size": slots if drafts_at_anchor else slots - 1,
        "sample_from_anchor": drafts_at_anchor,
        "mask_token_id": mask,
        # a layer's input there, its output here
        "target_layer_ids": [layer_id - 1 for layer_id in _need(fields, "target_layers")],
    }
    check_context_width(translated, shapes, NAME)
    return translated


def read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of the drafter in a file under our names, as plain weights."""
    import gguf

    tensors = {}
    for stored in _open(file).tensors:
        name = _our_name(stored.name)
        if name == "d2t":
            ids = torch.from_numpy(stored.data.copy()).long()
            # ids there, how far they are off here
            tensors[name] = ids - torch.arange(len(ids))
            continue
        plain = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        tensors[name] = plain.reshape(_shape(stored))
    return tensors


def _open(file: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"`gguf` must be installed to read {str(file)!r}, got no such package. Run `pip install dspark-hf[gguf]`."
        ) from error
    try:
        return gguf.GGUFReader(file)
    # its reader raises anything where a file is damaged
    except Exception as error:
        raise ValueError(
            f"`pretrained_model_name_or_path` must hold a whole GGUF file, got {str(file)!r}, which cannot be read "
            f"({type(error).__name__}). Fetch it again."
        ) from error


def _described(reader: Any) -> dict[str, Any]:
    """Return what a file says of its model, without the architecture before the names."""
    architecture = _value(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise _unreadable(f"hold a drafter of the architecture {' or '.join(_ARCHITECTURES)}", repr(architecture))
    prefix = f"{architecture}."
    fields = {name.removeprefix(prefix): _value(reader, name) for name in reader.fields if name.startswith(prefix)}
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise _unreadable("leave out what is not known to mean the same", f"`{prefix}{unknown[0]}`")
    if fields.get("markov_head_type", "vanilla") != "vanilla":
        raise _unreadable("have a vanilla Markov head", repr(fields["markov_head_type"]))
    return fields


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    try:
        return None if field is None else field.contents()
    except (UnicodeDecodeError, IndexError) as error:
        raise _unreadable(f"say `{name}` in words", f"a damaged one ({type(error).__name__})") from error


def _num_tokens(reader: Any) -> int:
    # the words themselves are many, and nobody's concern here
    tokens = reader.get_field("tokenizer.ggml.tokens")
    return 0 if tokens is None else len(tokens.data)


def _need(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise _unreadable(f"say `{name}`", "none")
    return fields[name]


def _our_name(name: str) -> str:
    match = _LAYER.fullmatch(name)
    if match is not None and match[2] in _LAYER_TENSORS:
        return f"layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{match[3]}"
    if name not in _TENSORS:
        raise _unreadable("hold a drafter's tensors alone", f"'{name}'")
    return _TENSORS[name]


def _shape(tensor: Any) -> tuple[int, ...]:
    # the fastest dimension comes first there
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return (1, *shape) if tensor.name == "conf_proj.weight" and len(shape) == 1 else shape


def _dtype(reader: Any) -> str:
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    # what was quantised has no more bits than these
    return {("F32",): "float32", ("F16",): "float16"}.get(tuple(sorted(kinds)), "bfloat16")


def _rope(fields: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    kind = fields.get("rope.scaling.type", "none")
    parameters = {"rope_type": "default" if kind == "none" else kind, "rope_theta": fields.get("rope.freq_base", 1e4)}
    share = fields.get("rope.dimension_count", head_dim) / head_dim
    if share != 1:
        parameters["partial_rotary_factor"] = share
    if kind != "none":
        numbers = {ours: fields[theirs] for theirs, ours in _ROPE_NUMBERS.items() if theirs in fields}
        parameters.update({name: value for name, value in numbers.items() if kind == "yarn" or name == "factor"})
    return parameters


def _unreadable(rule: str, found: str) -> Unreadable:
    return Unreadable(rule, f"a drafter in the layout of {NAME} with {found}")
