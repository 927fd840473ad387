"""A tiny random DeepSeek-V4 checkpoint, laid out as the released ones: what to try tools on before the real weights.

o rows, i columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dspark_hf.modeling.deepseek_v4.chat.constants import BOS, DSML, EOS, SPECIAL_TOKENS, THINK_END, THINK_START
from dspark_hf.modeling.deepseek_v4.chat.template import set_chat_template
from dspark_hf.modeling.deepseek_v4.configuration import RELEASED_MODEL_TYPE, DeepseekV4DSparkConfig
from dspark_hf.modeling.deepseek_v4.formats import quantize_fp4, quantize_fp8
from dspark_hf.modeling.deepseek_v4.modeling import DeepseekV4DSparkForCausalLM
from dspark_hf.modeling.deepseek_v4.stage import DeepseekV4Stage

ExpertFormat = Literal["fp4", "fp8", "bf16"]

_NUM_STAGES = 3
_VOCAB_MULTIPLE = 64
# window, CSA, HCA, CSA, window
_RATIOS = (0, 4, 8, 4, 0)
# transformers 5.24: DeepseekV4Config knows no ratios but 0, 4 and 128 unless kinds and rates are spelled out
_LAYER_TYPES = {0: "sliding_attention", 4: "compressed_sparse_attention", 8: "heavily_compressed_attention"}
# words of the text, which stay when special tokens are skipped
_PLAIN_TOKENS = (THINK_START, THINK_END, DSML)
_FP32_ENDINGS = ("attn_sink", "ape", "gate.bias")
_FP8_ENDINGS = (
    *(f"attn.{name}.weight" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b")),
    *(f"shared_experts.{name}.weight" for name in ("w1", "w2", "w3")),
    "main_proj.weight",
)
_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def write_tiny_checkpoint(
    folder: str | Path,
    *,
    seed: int = 0,
    experts: ExpertFormat = "fp4",
    with_dspark: bool = True,
    max_shard_bytes: int = 1 << 20,
) -> None:
    """Write a tiny random DeepSeek-V4 checkpoint: configuration, sharded weights and a byte-level tokenizer.

    Names, dtypes, scales and the order of shards are those of the released checkpoints; so are all kinds of layers
    (window, CSA, HCA, hash routing), but HCA compresses by 8, so that short texts reach it. For Transformers' own
    classes `config.json` therefore also has `layer_types` and `compress_rates`, which the released ones leave out.

    The same arguments give the same bytes, and the weights before they are rounded to their formats depend on `seed`
    alone.

    Args:
        folder: where to; it must be absent or empty.
        seed: of the weights.
        experts: `"fp4"` as Flash and Pro are stored (4-bit experts, the other matrices in FP8, power-of-two scales),
            `"fp8"` as their -Base (all in FP8, fp32 scales), or `"bf16"` with nothing quantised.
        with_dspark: whether the checkpoint carries a DSpark module, `mtp.*`, in shards of its own.
        max_shard_bytes: size of a shard beyond which the next begins.

    Raises:
        ValueError: if `folder` holds something, or an argument is out of range.
    """
    folder = Path(folder)
    if experts not in get_args(ExpertFormat):
        raise ValueError(f"`experts` must be one of {get_args(ExpertFormat)}, got {experts!r}. Choose one of them.")
    if max_shard_bytes < 1:
        raise ValueError(f"`max_shard_bytes` must be at least 1, got {max_shard_bytes}. Raise it.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder` must be absent or empty, got {str(folder)!r}. Name another, or empty it.")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    fields = _fields(tokenizer, experts, with_dspark)
    _write_json(folder / "config.json", fields)
    ids = {name: fields[name] for name in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "generation_config.json", {**ids, "transformers_version": fields["transformers_version"]})
    tokenizer.save_pretrained(folder)
    config = DeepseekV4DSparkConfig(**fields)
    generator = torch.Generator().manual_seed(seed)
    # the target first: its weights are the same with and without the module
    parts = [_target_shapes(config), _stage_shapes(config)] if with_dspark else [_target_shapes(config)]
    shards = []
    for shapes in parts:
        tensors = (
            stored
            for name, shape in shapes.items()
            for stored in _store(name, _draw(name, shape, config, generator), experts)
        )
        shards += list(_shards(tensors, max_shard_bytes))
    _write_shards(folder, shards)


def _fields(tokenizer: PreTrainedTokenizerFast, experts: ExpertFormat, with_dspark: bool) -> dict[str, Any]:
    """Return what `config.json` says, under the released names."""
    fields: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": RELEASED_MODEL_TYPE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "compress_rates": {kind: ratio for ratio, kind in _LAYER_TYPES.items() if ratio},
        "compress_ratios": list(_RATIOS),
        "compress_rope_theta": 160000,
        "hc_eps": 1e-6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 128,
        "index_head_dim": 32,
        # few heads tie exactly: all of them cut to zero
        "index_n_heads": 32,
        "index_topk": 8,
        "initializer_range": 0.02,
        "layer_types": [_LAYER_TYPES[ratio] for ratio in _RATIOS],
        "max_position_embeddings": 1024,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hash_layers": 2,
        "num_hidden_layers": len(_RATIOS),
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1 if with_dspark else 0,
        "o_groups": 2,
        "o_lora_rank": 32,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 16,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": -(-len(tokenizer) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
    }
    if experts == "fp4":
        fields["quantization_config"] = {**_QUANTIZATION, "scale_fmt": "ue8m0"}
        fields["expert_dtype"] = "fp4"
    elif experts == "fp8":
        fields["quantization_config"] = dict(_QUANTIZATION)
    if with_dspark:
        fields["compress_ratios"] += [0] * _NUM_STAGES
        fields["dspark_block_size"] = 5
        fields["dspark_noise_token_id"] = tokenizer.convert_tokens_to_ids(THINK_END)
        fields["dspark_target_layer_ids"] = [2, 3, 4]
        fields["dspark_markov_rank"] = 16
    return fields


def _target_shapes(config: DeepseekV4DSparkConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = DeepseekV4DSparkForCausalLM(config)
    return {name.removeprefix("model."): tensor.shape for name, tensor in model.state_dict().items()}


def _stage_shapes(config: DeepseekV4DSparkConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        stage = DeepseekV4Stage(config).state_dict()
    hidden, rank = config.hidden_size, config.dspark_markov_rank or 0
    num_streams, num_tapped = config.hc_mult, len(config.dspark_target_layer_ids or ())
    ends = {
        0: {"main_proj.weight": (hidden, num_tapped * hidden), "main_norm.weight": (hidden,)},
        _NUM_STAGES - 1: {
            "norm.weight": (hidden,),
            "hc_head_fn": (num_streams, num_streams * hidden),
            "hc_head_base": (num_streams,),
            "hc_head_scale": (1,),
            "markov_head.markov_w1.weight": (config.vocab_size, rank),
            "markov_head.markov_w2.weight": (config.vocab_size, rank),
            "confidence_head.proj.weight": (1, hidden + rank),
        },
    }
    shapes = {}
    for number in range(_NUM_STAGES):
        for name, tensor in stage.items():
            shapes[f"mtp.{number}.{name}"] = tensor.shape
        for name, shape in ends.get(number, {}).items():
            shapes[f"mtp.{number}.{name}"] = torch.Size(shape)
    return shapes


def _draw(name: str, shape: torch.Size, config: DeepseekV4DSparkConfig, generator: torch.Generator) -> Tensor:
    """Return random values in fp32 (numbers of experts as integers), of a size that keeps activations near 1."""
    if name.endswith("tid2eid"):
        # different experts for every token
        return torch.rand(shape[0], config.n_routed_experts, generator=generator).argsort(-1)[:, : shape[1]]
    values = torch.randn(shape, generator=generator)
    if name.endswith(("norm.weight", "_scale")):
        return 1 + 0.1 * values
    if name.endswith(("hc_attn_base", "hc_ffn_base")):
        # streams mostly keep to themselves
        num_streams = config.hc_mult
        values = 0.1 * values
        values[2 * num_streams :].view(num_streams, num_streams).diagonal().add_(4.0)
        return values
    if len(shape) == 1 or name.endswith("ape"):
        return 0.1 * values
    if name == "embed.weight" or name.endswith("markov_w1.weight"):
        return values
    return values * shape[-1] ** -0.5


def _store(name: str, values: Tensor, experts: ExpertFormat) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that hold `values` in the format of this name: the weight and, if it has some, its scales."""
    is_expert, is_fp8 = ".ffn.experts." in name, name.endswith(_FP8_ENDINGS)
    if not values.is_floating_point() or name.endswith(_FP32_ENDINGS) or name.rpartition(".")[2].startswith("hc_"):
        yield name, values
    elif experts == "bf16" or not (is_expert or is_fp8):
        yield name, values.to(torch.bfloat16)
    else:
        if is_expert and experts == "fp4":
            weight, scale = quantize_fp4(values)
        else:
            scale_dtype = torch.float8_e8m0fnu if experts == "fp4" else torch.float32
            weight, scale = quantize_fp8(values, scale_dtype=scale_dtype)
        yield name, weight
        yield f"{name.removesuffix('.weight')}.scale", scale


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def _write_shards(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the special tokens, BOS and EOS first, and one token for every byte."""
    words = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(word, special=word not in _PLAIN_TOKENS, normalized=False) for word in SPECIAL_TOKENS]
    )
    # EOS also pads, as in the released tokenizers
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    set_chat_template(wrapped)
    return wrapped
