"""Drafters in the packagings of other projects load, and draft what their files mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dspark_hf import DSparkAssistantModel, DSparkConfig
from tests.modeling.deepspec_layout import (
    BLOCK_SIZE,
    HIDDEN_SIZE,
    TARGET_LAYER_IDS,
    Layout,
    deepspec_fields,
    deepspec_weights,
)
from tests.modeling.drafting import draft_greedily
from tests.modeling.formats.layouts import (
    DRAFT_IDS,
    lending_target,
    reduced,
    specforge_fields,
    speculators_fields,
    without_vocabulary,
    write,
)
from tests.reference.drafter import DrafterOracle
from tests.thinning import slow

LENGTH, ANCHOR = 9, 7
TOLERANCE = 1e-5
WEIGHTS = deepspec_weights(Layout())
FIELDS = deepspec_fields(Layout())


def _context() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, LENGTH, len(TARGET_LAYER_IDS) * HIDDEN_SIZE, generator=generator)


def _check(folder: Path, oracle: DrafterOracle, weights: dict[str, Tensor], ids: list[int] | None = None) -> None:
    """Compare the drafter of a folder with the equations; of a reduced vocabulary by the oracle's own ids."""
    drafter = DSparkAssistantModel.from_pretrained(folder)
    context = _context()
    block = draft_greedily(drafter, lending_target(weights), context, [LENGTH], [ANCHOR])
    expected = oracle.block(context[0], list(range(LENGTH)), ANCHOR, LENGTH, true_ids=block.token_ids[0].tolist())
    logits = block.logits[0] if ids is None else block.logits[0][:, ids]
    torch.testing.assert_close(logits.double(), expected.logits, atol=TOLERANCE, rtol=0)
    confidence = expected.confidence_logits.sigmoid()
    torch.testing.assert_close(block.confidence[0].double(), confidence, atol=TOLERANCE, rtol=0)


def _oracle(slots: int = BLOCK_SIZE, weights: dict[str, Tensor] = WEIGHTS) -> DrafterOracle:
    return DrafterOracle(weights, {**FIELDS, "block_size": slots})


def _shards(folder: Path, suffix: str) -> None:
    """Split the tensors of a folder over two files, or put them into one `.bin`."""
    (folder / "model.safetensors").unlink()
    if suffix == "one.bin":
        torch.save(WEIGHTS, folder / "pytorch_model.bin")
        return
    base = "pytorch_model" if suffix == "bin" else "model"
    names = sorted(WEIGHTS)
    parts = {f"{base}-{i}.{suffix}": names[i::2] for i in range(2)}
    for file, held in parts.items():
        tensors = {name: WEIGHTS[name] for name in held}
        torch.save(tensors, folder / file) if suffix == "bin" else save_file(tensors, folder / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    index = folder / f"{base}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "one.bin"])
def test_a_deepspec_folder_may_be_sharded_or_pickled(suffix: str, tmp_path: Path) -> None:
    """A drafter that `save_pretrained(max_shard_size=...)` wrote could not be loaded."""
    _shards(write(tmp_path, FIELDS, WEIGHTS), suffix)
    _check(tmp_path, _oracle(), WEIGHTS)


def _prefixed_keys(where: str | None) -> dict[str, Any]:
    names = ("block_size", "mask_token_id", "target_layer_ids")
    kept = {name: value for name, value in FIELDS.items() if name not in names}
    if where is None:
        # what stands without the prefix is the target's
        wrong = {"block_size": 1, "mask_token_id": 0, "target_layer_ids": [0]}
        return {**kept, **wrong, **{f"dspark_{name}": FIELDS[name] for name in names}}
    return {**kept, where: {name: FIELDS[name] for name in names}}


_SAME_NUMBERS: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]] = {
    "DeepSpec, prefix model.": lambda: (FIELDS, {f"model.{name}": x for name, x in WEIGHTS.items()}),
    "DeepSpec, dspark_ keys": lambda: (_prefixed_keys(None), WEIGHTS),
    "DeepSpec, dspark_config": lambda: (_prefixed_keys("dspark_config"), WEIGHTS),
    "DeepSpec without vocabulary": lambda: (FIELDS, without_vocabulary(WEIGHTS)),
    "DeepSpec without head": lambda: (FIELDS, {name: x for name, x in WEIGHTS.items() if name != "lm_head.weight"}),
    "speculators": lambda: (speculators_fields(), without_vocabulary(WEIGHTS)),
    "SpecForge": lambda: (specforge_fields(), without_vocabulary(WEIGHTS)),
    "SpecForge, early": lambda: (
        specforge_fields(),
        {f"logit_head.{n}" if "_head." in n else n: x for n, x in without_vocabulary(WEIGHTS).items()},
    ),
}


@pytest.mark.parametrize("name", _SAME_NUMBERS)
def test_the_same_tensors_draft_the_same(name: str, tmp_path: Path) -> None:
    """A packaging that says the same in other words would not load, or draft other tokens."""
    _check(write(tmp_path, *_SAME_NUMBERS[name]()), _oracle(), WEIGHTS)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_a_reduced_vocabulary_has_its_own_head(head: str, tmp_path: Path) -> None:
    """The head that a drafter brought for its own vocabulary would be dropped for the target's rows."""
    weights = deepspec_weights(Layout(markov_head_type=head))
    tensors = reduced(weights)
    # another head than the target's rows
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    write(tmp_path, speculators_fields(len(DRAFT_IDS), markov_head_type=head), tensors)
    oracle = _oracle(weights={**tensors, "embed_tokens.weight": weights["embed_tokens.weight"]})
    _check(tmp_path, oracle, weights, DRAFT_IDS)


@pytest.mark.parametrize(
    ("changes", "head"),
    [({"sample_from_anchor": False}, "rnn"), ({"sample_from_anchor": None}, "vanilla")]
    + [slow({"sample_from_anchor": False}, head) for head in ("vanilla", "gated")]
    + [slow({"sample_from_anchor": None}, head) for head in ("gated", "rnn")],
)
def test_the_anchors_slot_may_draft_nothing(changes: dict[str, Any], head: str, tmp_path: Path) -> None:
    """Files of the other slot convention would draft every token one place late: right text, no speed."""
    weights = deepspec_weights(Layout(markov_head_type=head))
    fields = speculators_fields(markov_head_type=head, **changes)
    if fields["sample_from_anchor"] is None:
        # as old files
        del fields["sample_from_anchor"]
    write(tmp_path, fields, without_vocabulary(weights))
    assert DSparkConfig.from_pretrained(tmp_path).block_size == BLOCK_SIZE - 1
    oracle = _oracle(weights=weights)
    oracle.num_dead_slots = 1
    _check(tmp_path, oracle, weights)


def test_training_sees_the_slots_that_decoding_sees(tmp_path: Path) -> None:
    """A drafter of the other slot convention, or with sliding layers, would be trained on other slots than it uses."""
    weights = deepspec_weights(Layout(markov_head_type="rnn"))
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "use_sliding_window": True}
    fields = speculators_fields(markov_head_type="rnn", sample_from_anchor=False, layers=layers)
    drafter = DSparkAssistantModel.from_pretrained(write(tmp_path, fields, without_vocabulary(weights)))
    context, target = _context(), lending_target(weights)
    block = draft_greedily(drafter, target, context, [LENGTH], [ANCHOR])
    previous = torch.cat([torch.tensor([[ANCHOR]]), block.token_ids[:, :-1]], dim=1)
    # the sequence goes on behind the anchor: the block must not see that
    longer = torch.cat([context, torch.randn(1, 3, context.shape[-1])], dim=1)
    with torch.no_grad():
        trained = drafter(longer, torch.tensor([[ANCHOR]]), torch.tensor([[LENGTH]]), previous[:, None], target)
        logits = drafter.draft_head(target)(trained.hidden_states) + drafter.markov_head.project(trained.latents)
    torch.testing.assert_close(logits[:, 0], block.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(trained.confidence_logits[:, 0].sigmoid(), block.confidence, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("is_causal", "types"),
    [
        (True, ["sliding_attention", "full_attention"]),
        (False, ["sliding_attention"] * 2),
        slow(True, ["sliding_attention"] * 2),
        slow(False, ["sliding_attention", "full_attention"]),
    ],
)
def test_layers_may_slide(is_causal: bool, types: list[str], tmp_path: Path) -> None:
    """Layers trained on a window would see all of a long text, or slots after their own."""
    layers = {"layer_types": types, "sliding_window": 4, "use_sliding_window": True}
    fields = speculators_fields(layers=layers, sliding_window_non_causal=not is_causal)
    write(tmp_path, fields, without_vocabulary(WEIGHTS))
    oracle = _oracle()
    sliding = [f"layers.{i}" for i, kind in enumerate(types) if kind == "sliding_attention"]
    oracle.windows = dict.fromkeys(sliding, 4)
    oracle.causal_layers = tuple(sliding) if is_causal else ()
    _check(tmp_path, oracle, WEIGHTS)


_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {**_YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# a file's own fields, and what a Qwen 3 layer is trained with under them
_ROTATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "YaRN": ({"rope_parameters": {**_YARN, "beta_fast": 16.0}}, {**_YARN, "beta_fast": 16.0}),
    "YaRN with its own factor": (
        {"rope_parameters": {**_YARN, "attention_factor": 1.5}},
        {**_YARN, "attention_factor": 1.5},
    ),
    "YaRN in early Transformers' words": (
        {
            "rope_parameters": None,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        _YARN,
    ),
    "YaRN whose first length is the longest": (
        {"rope_parameters": {name: x for name, x in _YARN.items() if name != "original_max_position_embeddings"}},
        {**_YARN, "original_max_position_embeddings": 512},
    ),
    "Llama 3's": ({"rope_parameters": _LLAMA3}, _LLAMA3),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
    "a share that a Qwen 3 layer does not read": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
        {"rope_type": "default", "rope_theta": 1e6},
    ),
    "full attention's, of several": (
        {"rope_parameters": {"full_attention": _YARN}},
        _YARN,
    ),
}


@pytest.mark.parametrize("layout", ["DeepSpec", "SpecForge", "speculators"])
@pytest.mark.parametrize("name", _ROTATIONS)
def test_rotations_are_those_it_was_trained_with(name: str, layout: str, tmp_path: Path) -> None:
    """A drafter would turn otherwise than in training: right text, few drafts accepted, no word."""
    given, trained = _ROTATIONS[name]
    if layout == "speculators":
        if "full_attention" in (given.get("rope_parameters") or {}):
            pytest.skip("its Qwen 3 layers know one rotation")
        layers = {key: value for key, value in given.items() if value is not None}
        fields = speculators_fields(layers=layers)
        if given.get("rope_parameters") is None:
            del fields["transformer_layer_config"]["rope_parameters"]
    else:
        fields = {**(FIELDS if layout == "DeepSpec" else specforge_fields()), **given}
    drafter = DSparkAssistantModel.from_pretrained(write(tmp_path, fields, without_vocabulary(WEIGHTS)))
    theirs = Qwen3RotaryEmbedding(
        Qwen3Config(head_dim=8, num_attention_heads=4, max_position_embeddings=512, rope_parameters=dict(trained))
    )
    positions = torch.tensor([[0, 1, 5, 63, 64, 500]])
    expected = theirs(torch.zeros(1), positions)
    for ours, other in zip(drafter.rotary_emb(positions, torch.float32), expected, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-6)


def test_lfm2_turns_neighbours(tmp_path: Path) -> None:
    """LiquidAI's drafters would rotate the wrong pairs of entries."""
    fields = specforge_fields("Lfm2DSparkDraftModel", rope_is_neox_style=False)
    del fields["dflash_config"]["projector_type"]
    oracle = _oracle()
    oracle.is_interleaved = True
    _check(write(tmp_path, fields, without_vocabulary(WEIGHTS)), oracle, WEIGHTS)


def test_dflash_drafts_one_less_than_its_slots(tmp_path: Path) -> None:
    """z-lab's drafters would draft every token one place late."""
    weights = deepspec_weights(Layout(markov_head_type=None, confidence="none"))
    fields = specforge_fields("DFlashDraftModel")
    fields["dflash_config"] = {name: FIELDS[name] for name in ("mask_token_id", "target_layer_ids")}
    drafter = DSparkAssistantModel.from_pretrained(write(tmp_path, fields, without_vocabulary(weights)))
    assert (drafter.block_size, drafter.config.markov_rank) == (BLOCK_SIZE - 1, 0)
    oracle = _oracle(weights=weights)
    oracle.num_dead_slots = 1
    block = draft_greedily(drafter, lending_target(weights), _context(), [LENGTH], [ANCHOR])
    expected = oracle.block(_context()[0], list(range(LENGTH)), ANCHOR, LENGTH)
    torch.testing.assert_close(block.logits[0].double(), expected.logits, atol=TOLERANCE, rtol=0)


def test_temperatures_of_a_foreign_folder_are_kept(tmp_path: Path) -> None:
    """A calibrated drafter would lose its temperatures on the way, or keep some that do not fit."""
    temperatures = [1.5, 1.25, 1.0, 0.75, 0.5]
    write(tmp_path, {**FIELDS, "sts_temperatures": temperatures}, WEIGHTS)
    assert DSparkAssistantModel.from_pretrained(tmp_path).config.sts_temperatures == temperatures
    write(tmp_path, {**FIELDS, "sts_temperatures": temperatures[:-1]}, WEIGHTS)
    with pytest.raises(ValueError, match="`sts_temperatures` must be 5 positive numbers"):
        DSparkAssistantModel.from_pretrained(tmp_path)


def test_the_target_that_a_file_names_is_kept(tmp_path: Path) -> None:
    """Which target a drafter was made for would be lost with the packaging."""
    write(tmp_path, speculators_fields(), without_vocabulary(WEIGHTS))
    assert DSparkConfig.from_pretrained(tmp_path).base_model_name_or_path == "someone/a-target"


_PACKED = {"layers.0.mlp.gate_proj.qweight": torch.zeros(3, dtype=torch.int32)}
_UNREADABLE: dict[str, tuple[Callable[[], tuple[dict[str, Any], dict[str, Tensor]]], str]] = {
    "no norm": (
        lambda: (FIELDS, {name: x for name, x in WEIGHTS.items() if name != "norm.weight"}),
        "must hold the tensor 'norm.weight', got a drafter in the layout of DeepSpec without",
    ),
    "no block size": (
        lambda: ({name: value for name, value in FIELDS.items() if name != "block_size"}, WEIGHTS),
        "must say `block_size` in its configuration, got a drafter in the layout of DeepSpec without",
    ),
    "four bits of GPTQ": (
        lambda: (
            FIELDS,
            {**{name: x for name, x in WEIGHTS.items() if name != "layers.0.mlp.gate_proj.weight"}, **_PACKED},
        ),
        "must hold weights in floating point, or in fewer bits as compressed-tensors writes them, got a drafter",
    ),
    "another number of taps": (
        lambda: ({**FIELDS, "target_layer_ids": [1, 3]}, WEIGHTS),
        "must read 2 layers of 32 numbers, as its configuration says",
    ),
    "speculators without a mask": (
        lambda: (speculators_fields(mask_token_id=None), without_vocabulary(WEIGHTS)),
        "must say `mask_token_id` in its configuration, got a drafter in the layout of speculators without",
    ),
    "another kind of speculators": (
        lambda: ({**speculators_fields(), "speculators_model_type": "eagle3"}, WEIGHTS),
        "a drafter of the kind 'eagle3' in speculators' layout, which is not read yet",
    ),
    "sliding SpecForge": (
        lambda: (specforge_fields(layer_types=["sliding_attention"] * 2), without_vocabulary(WEIGHTS)),
        "in the layout of SpecForge with sliding layers, which are read of speculators only",
    ),
    "sliding DeepSpec": (
        lambda: ({**FIELDS, "layer_types": ["full_attention", "sliding_attention"]}, WEIGHTS),
        "in the layout of DeepSpec with sliding layers, which are read of speculators only",
    ),
    "Kimi K3": (
        lambda: ({"model_type": "k3_dspark", "architectures": ["KimiK3DSparkModel"]}, WEIGHTS),
        r"a DSpark drafter in Kimi K3's layout \(KimiK3DSparkModel, k3_dspark\), which is not read yet",
    ),
    "Nemotron": (
        lambda: ({"model_type": "nemotron_h", "architectures": ["NemotronHDSparkModel"]}, WEIGHTS),
        r"a DSpark drafter in Nemotron's layout \(NemotronHDSparkModel\), which is not read yet",
    ),
    "Mistral": (
        lambda: ({"model_type": "mistral_large4", "architectures": ["MistralLarge4ForCausalLM"]}, WEIGHTS),
        r"the DSpark module inside a Mistral checkpoint \(`mtp_dspark.\*`\), which is not read yet",
    ),
    "a rotation that depends on the length": (
        lambda: ({**FIELDS, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, WEIGHTS),
        "`rope_parameters` must have a `rope_type` of",
    ),
}


@pytest.mark.parametrize("name", _UNREADABLE)
def test_what_is_not_read_is_named(name: str, tmp_path: Path) -> None:
    """A folder that cannot be read would end in a bare KeyError, or be called no drafter."""
    make, message = _UNREADABLE[name]
    write(tmp_path, *make())
    with pytest.raises(ValueError, match=message):
        DSparkAssistantModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "must hold whole files, got .*index.json', which holds no `weight_map`"),
        ('{"weight_map": []}', "must hold whole files, got .*index.json', which holds no `weight_map`"),
        ("no json", "must hold whole files, got .*index.json', which holds no JSON"),
        (
            '{"weight_map": {"fc.weight": "../model.safetensors"}}',
            "which names .*, which is no file in its folder",
        ),
        (
            '{"weight_map": {"fc.weight": "/etc/passwd"}}',
            "which names .*, which is no file in its folder",
        ),
    ],
)
def test_a_damaged_index_is_named(content: str, message: str, tmp_path: Path) -> None:
    """A damaged index would end in a bare KeyError, or read files outside of its folder."""
    write(tmp_path, FIELDS, WEIGHTS)
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        DSparkAssistantModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_tensors_are_named(name: str, tmp_path: Path) -> None:
    """A cut download would be told of without its file."""
    write(tmp_path, FIELDS, WEIGHTS)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    with pytest.raises(ValueError, match=f"must hold whole files( of tensors)?, got .*{name}"):
        DSparkAssistantModel.from_pretrained(tmp_path)


class _Opens:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


def test_pickles_run_nothing(tmp_path: Path) -> None:
    """A `.bin` file could run what it likes."""
    write(tmp_path, FIELDS, WEIGHTS)
    (tmp_path / "model.safetensors").unlink()
    torch.save({**WEIGHTS, "extra": _Opens(tmp_path / "opened")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold whole files of tensors"):
        DSparkAssistantModel.from_pretrained(tmp_path)
    assert not (tmp_path / "opened").exists()
