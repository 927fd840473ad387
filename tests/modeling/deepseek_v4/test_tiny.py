"""The tiny checkpoint is laid out as the released ones, and runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from dspark_hf import DeepseekV4DSparkConfig, DeepseekV4DSparkForCausalLM
from dspark_hf.modeling.deepseek_v4.formats import dequantize
from dspark_hf.modeling.deepseek_v4.tiny import write_tiny_checkpoint
from tests.thinning import mostly_slow

BF16, F32, I64 = torch.bfloat16, torch.float32, torch.int64
HIDDEN, HEADS, HEAD, LATENT, GROUPS, O_RANK, WIDTH, EXPERTS = 128, 4, 64, 64, 2, 32, 64, 8
FORMATS = ("fp4", "fp8", "bf16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    for name in FORMATS:
        write_tiny_checkpoint(root / name, experts=name)
    write_tiny_checkpoint(root / "plain", with_dspark=False)
    return {path.name: path for path in root.iterdir()}


def _read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _fields(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _matrix(name: str, rows: int, columns: int, kind: str) -> dict:
    """Return the tensors of a matrix stored as `fp4`, `fp8` (scales E8M0), `fp8-base` (scales fp32) or `bf16`."""
    if kind == "bf16":
        return {f"{name}.weight": (BF16, (rows, columns))}
    if kind == "fp4":
        return {
            f"{name}.weight": (torch.int8, (rows, columns // 2)),
            f"{name}.scale": (torch.float8_e8m0fnu, (rows, columns // 32)),
        }
    return {
        f"{name}.weight": (torch.float8_e4m3fn, (rows, columns)),
        f"{name}.scale": (F32 if kind == "fp8-base" else torch.float8_e8m0fnu, (-(-rows // 128), -(-columns // 128))),
    }


def _block(prefix: str, dense: str, routed: str) -> dict:
    """Return what layers and stages share."""
    wanted = {
        **_matrix(f"{prefix}attn.wq_a", LATENT, HIDDEN, dense),
        **_matrix(f"{prefix}attn.wq_b", HEADS * HEAD, LATENT, dense),
        **_matrix(f"{prefix}attn.wkv", HEAD, HIDDEN, dense),
        **_matrix(f"{prefix}attn.wo_a", GROUPS * O_RANK, HEADS * HEAD // GROUPS, dense),
        **_matrix(f"{prefix}attn.wo_b", HIDDEN, GROUPS * O_RANK, dense),
        f"{prefix}attn.q_norm.weight": (BF16, (LATENT,)),
        f"{prefix}attn.kv_norm.weight": (BF16, (HEAD,)),
        f"{prefix}attn.attn_sink": (F32, (HEADS,)),
        f"{prefix}attn_norm.weight": (BF16, (HIDDEN,)),
        f"{prefix}ffn_norm.weight": (BF16, (HIDDEN,)),
        f"{prefix}ffn.gate.weight": (BF16, (EXPERTS, HIDDEN)),
    }
    for part in ("attn", "ffn"):
        wanted[f"{prefix}hc_{part}_fn"] = (F32, (24, 4 * HIDDEN))
        wanted[f"{prefix}hc_{part}_base"] = (F32, (24,))
        wanted[f"{prefix}hc_{part}_scale"] = (F32, (3,))
    experts = [(f"experts.{number}", routed) for number in range(EXPERTS)]
    for name, kind in [*experts, ("shared_experts", dense)]:
        wanted.update(_matrix(f"{prefix}ffn.{name}.w1", WIDTH, HIDDEN, kind))
        wanted.update(_matrix(f"{prefix}ffn.{name}.w2", HIDDEN, WIDTH, kind))
        wanted.update(_matrix(f"{prefix}ffn.{name}.w3", WIDTH, HIDDEN, kind))
    return wanted


def _compressor(prefix: str, ratio: int, size: int) -> dict:
    columns = 2 * size if ratio == 4 else size
    return {
        f"{prefix}compressor.wkv.weight": (BF16, (columns, HIDDEN)),
        f"{prefix}compressor.wgate.weight": (BF16, (columns, HIDDEN)),
        f"{prefix}compressor.ape": (F32, (ratio, columns)),
        f"{prefix}compressor.norm.weight": (BF16, (size,)),
    }


def _hyper_head(prefix: str) -> dict:
    return {
        f"{prefix}hc_head_fn": (F32, (4, 4 * HIDDEN)),
        f"{prefix}hc_head_base": (F32, (4,)),
        f"{prefix}hc_head_scale": (F32, (1,)),
    }


def _target(dense: str, routed: str, vocab: int) -> dict:
    wanted = {
        "embed.weight": (BF16, (vocab, HIDDEN)),
        "head.weight": (BF16, (vocab, HIDDEN)),
        "norm.weight": (BF16, (HIDDEN,)),
        **_hyper_head(""),
    }
    for layer, ratio in enumerate([0, 4, 8, 4, 0]):
        prefix = f"layers.{layer}."
        wanted.update(_block(prefix, dense, routed))
        if layer < 2:
            wanted[f"{prefix}ffn.gate.tid2eid"] = (I64, (vocab, 2))
        else:
            wanted[f"{prefix}ffn.gate.bias"] = (F32, (EXPERTS,))
        if ratio:
            wanted.update(_compressor(f"{prefix}attn.", ratio, HEAD))
        if ratio == 4:
            wanted.update(_matrix(f"{prefix}attn.indexer.wq_b", 32 * 32, LATENT, dense))
            wanted[f"{prefix}attn.indexer.weights_proj.weight"] = (BF16, (32, HIDDEN))
            wanted.update(_compressor(f"{prefix}attn.indexer.", ratio, 32))
    return wanted


def _module(dense: str, routed: str, vocab: int) -> dict:
    wanted = {}
    for stage in range(3):
        wanted.update(_block(f"mtp.{stage}.", dense, routed))
        wanted[f"mtp.{stage}.ffn.gate.bias"] = (F32, (EXPERTS,))
    return {
        **wanted,
        **_matrix("mtp.0.main_proj", HIDDEN, 3 * HIDDEN, dense),
        "mtp.0.main_norm.weight": (BF16, (HIDDEN,)),
        "mtp.2.norm.weight": (BF16, (HIDDEN,)),
        **_hyper_head("mtp.2."),
        "mtp.2.markov_head.markov_w1.weight": (BF16, (vocab, 16)),
        "mtp.2.markov_head.markov_w2.weight": (BF16, (vocab, 16)),
        "mtp.2.confidence_head.proj.weight": (BF16, (1, HIDDEN + 16)),
    }


@pytest.mark.parametrize(
    ("name", "dense", "routed"),
    [("fp4", "fp8", "fp4"), ("fp8", "fp8-base", "fp8-base"), ("bf16", "bf16", "bf16"), ("plain", "fp8", "fp4")],
)
def test_tensors_are_the_released_ones(folders, name, dense, routed):
    """What is tried on the tiny checkpoint says nothing about the real ones."""
    vocab = _fields(folders[name])["vocab_size"]
    wanted = _target(dense, routed, vocab)
    if name != "plain":
        wanted.update(_module(dense, routed, vocab))
    found = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in _read(folders[name]).items()}
    assert found == wanted


def test_index_and_shards(folders):
    """A loader that goes by the index misses tensors, or has to read the target for the module."""
    for folder in folders.values():
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
        assert len(files) > 1
        assert index["weight_map"] == {key: name for name, tensors in files.items() for key in tensors}
        assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in files.values() for t in tensors.values())
        for tensors in files.values():
            assert len({key.startswith("mtp.") for key in tensors}) == 1


def test_shards_are_as_small_as_asked(tmp_path):
    """Loading in parts is tried on a single one."""
    write_tiny_checkpoint(tmp_path, max_shard_bytes=200_000)
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 10
    assert max(sizes) <= 200_000


def test_configuration_reads_as_released(folders):
    """Tools tell the tiny checkpoint's format or module wrongly."""
    fields = {name: _fields(folder) for name, folder in folders.items()}
    assert all(each["model_type"] == "deepseek_v4" for each in fields.values())
    assert {name: each.get("expert_dtype") for name, each in fields.items()} == {
        "fp4": "fp4",
        "fp8": None,
        "bf16": None,
        "plain": "fp4",
    }
    assert fields["fp4"]["quantization_config"]["weight_block_size"] == [128, 128]
    assert fields["fp8"]["quantization_config"]["quant_method"] == "fp8"
    assert "quantization_config" not in fields["bf16"]
    assert not any(name.startswith("dspark_") for name in fields["plain"])
    config = DeepseekV4DSparkConfig.from_pretrained(folders["fp4"])
    assert config.attention_kinds == ["window", "csa", "hca", "csa", "window"]
    assert config.compress_ratios == [0, 4, 8, 4, 0, 0, 0, 0]
    assert config.dspark_target_layer_ids == [2, 3, 4]
    assert config.has_dspark
    # by Transformers' own class, which tokenizers ask, too
    native = AutoConfig.from_pretrained(folders["fp4"])
    assert native.model_type == "deepseek_v4"
    assert native.compress_rates == {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    assert native.layer_types[2] == "heavily_compressed_attention"
    assert not DeepseekV4DSparkConfig.from_pretrained(folders["plain"]).has_dspark


def test_same_seed_same_files(folders, tmp_path):
    """Two machines that should have the same checkpoint have different ones."""
    write_tiny_checkpoint(tmp_path / "again")
    write_tiny_checkpoint(tmp_path / "other", seed=1)
    names = sorted(path.name for path in folders["fp4"].iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        content = (folders["fp4"] / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == content
        if name.endswith(".safetensors"):
            assert (tmp_path / "other" / name).read_bytes() != content


def test_formats_hold_the_same_weights(folders):
    """A format cannot be compared with another, as it is another model."""
    quantised, dense = _read(folders["fp4"]), _read(folders["bf16"])
    plain = _read(folders["plain"])
    assert all(
        torch.equal(tensor.view(torch.uint8), quantised[key].view(torch.uint8)) for key, tensor in plain.items()
    )
    for key, (step, routed) in {
        "layers.3.attn.wkv": (2**-4, False),
        "mtp.1.ffn.experts.5.w2": (0.25, True),
    }.items():
        wanted = dense[f"{key}.weight"].float()
        found = dequantize(quantised[f"{key}.weight"], quantised[f"{key}.scale"], torch.float32)
        assert (quantised[f"{key}.weight"].dtype == torch.int8) is routed
        assert (found - wanted).norm() < step * wanted.norm()


@pytest.mark.parametrize("name", mostly_slow([*FORMATS, "plain"], ("fp4",)))
def test_target_loads_and_generates(folders, name):
    """The target's weights do not fit our model, or its logits are no numbers."""
    stored = {key: value for key, value in _read(folders[name]).items() if not key.startswith("mtp.")}
    weights = {}
    for key, tensor in stored.items():
        if key.endswith(".scale"):
            continue
        scale = stored.get(f"{key.removesuffix('weight')}scale")
        prefix = "" if key.startswith("head.") else "model."
        weights[prefix + key] = tensor if scale is None else dequantize(tensor, scale, torch.bfloat16)
    model = DeepseekV4DSparkForCausalLM(DeepseekV4DSparkConfig.from_pretrained(folders[name])).eval()
    model.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    inputs = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 5
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None)
    # greedy text wanders instead of repeating one token
    assert len(set(output[0, inputs["input_ids"].shape[1] :].tolist())) > 8


def test_tokenizer(folders):
    """Text or special tokens do not come back, or the model meets ids that it does not know."""
    fields = _fields(folders["fp4"])
    tokenizer = AutoTokenizer.from_pretrained(folders["fp4"])
    assert (
        (tokenizer.bos_token_id, tokenizer.eos_token_id) == (fields["bos_token_id"], fields["eos_token_id"]) == (0, 1)
    )
    assert len(tokenizer) <= fields["vocab_size"] < len(tokenizer) + 64
    text = "naïve 漢字 🙂\n\t<｜User｜>x<think>y</think>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    messages = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:5] == [
        "<｜begin▁of▁sentence｜>",
        "<｜User｜>",
        "h",
        "i",
        "<｜Assistant｜>",
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("hi")
    assert tokenizer.convert_ids_to_tokens(fields["dspark_noise_token_id"]) == "</think>"


def test_mistakes_are_told(tmp_path):
    """Files of two checkpoints are mixed in one folder."""
    (tmp_path / "mine.txt").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="`folder` must be absent or empty"):
        write_tiny_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="`experts` must be one of"):
        write_tiny_checkpoint(tmp_path / "new", experts="fp2")
    with pytest.raises(ValueError, match="`max_shard_bytes` must be at least 1, got 0"):
        write_tiny_checkpoint(tmp_path / "new", max_shard_bytes=0)
    assert not (tmp_path / "new").exists()
