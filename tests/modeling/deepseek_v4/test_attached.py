"""The DSpark module read out of a DeepSeek-V4 checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, configuration_utils

from dspark_hf import DeepseekV4DSparkForCausalLM, DSparkAssistantModel, hubs, load_drafter_for
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.deepseek_v4.formats import dequantize
from dspark_hf.modeling.deepseek_v4.linear import QuantizedWeight
from dspark_hf.modeling.deepseek_v4.tiny import write_tiny_checkpoint
from dspark_hf.modeling.formats import tensors as reading
from dspark_hf.modeling.formats.tensors import iterate_tensors, read_index
from tests.modeling.deepseek_v4.tiny import oracle_settings
from tests.reference.deepseek_v4_drafter import draft
from tests.thinning import slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a tiny checkpoint with FP4 experts and a DSpark module."""
    folder = tmp_path_factory.mktemp("attached")
    write_tiny_checkpoint(folder)
    return folder


def _prompts(num_rows: int) -> torch.Tensor:
    return torch.randint(200, (num_rows, 21), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_rows", [slow(1), 3])
def test_use_dspark_changes_no_token(folder, num_rows):
    """Text with the checkpoint's own drafter is not the text without it."""
    model = DeepseekV4DSparkForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(_prompts(num_rows), **options)
    assert torch.equal(model.generate(_prompts(num_rows), use_dspark=True, **options), plain)
    assert model.dspark.last_statistics.num_drafted > 0
    assert model.dspark is model.dspark
    # what the target brings goes before what any registry knows
    assert load_drafter_for(model) is model.dspark


def test_drafts_are_those_of_the_oracle(folder):
    """Tensors of the module land in the wrong places."""
    target = DeepseekV4DSparkForCausalLM.from_pretrained(folder, dtype=torch.float32)
    infos = read_index(folder, "mtp.")
    stored = dict(iterate_tensors(infos, infos))
    weights = {
        name: dequantize(value, stored[f"{name[:-6]}scale"], torch.float32)
        if f"{name[:-6]}scale" in stored and name.endswith(".weight")
        else value
        for name, value in stored.items()
        if not name.endswith(".scale")
    }
    drafter = target.dspark
    features = torch.randn(1, 30, 3 * target.config.hidden_size)
    expected = draft(
        weights,
        oracle_settings(target.config),
        features[0],
        7,
        30,
        target.model.embed.weight,
        target.head.weight,
        block_size=drafter.block_size,
        noise_token_id=drafter.config.mask_token_id,
    )
    with torch.no_grad():
        context = drafter.start(TargetAdapter(target), 1)
        context.extend(features, torch.arange(30)[None], [30])
        block = context.draft(
            torch.tensor([7]),
            torch.tensor([30]),
            drafter.block_size,
            lambda slot, logits, _: (logits.argmax(-1), None),
        )
    assert block.token_ids[0].tolist() == expected.token_ids
    confidence = expected.confidence_logits.sigmoid()
    torch.testing.assert_close(block.confidence[0].double(), confidence, atol=1e-4, rtol=1e-4)


def test_kept_as_stored(folder):
    """The module is blown up to floating point although nobody asked for it, or a kept one fails."""
    drafter = DSparkAssistantModel.from_pretrained(folder)
    assert any(isinstance(module, QuantizedWeight) for module in drafter.modules())
    assert drafter.dtype == torch.bfloat16
    model = DeepseekV4DSparkForCausalLM.from_pretrained(folder)
    text = model.generate(_prompts(2), max_new_tokens=3, do_sample=False, assistant_model=drafter, eos_token_id=None)
    assert text.shape == (2, 24)
    drafter = DSparkAssistantModel.from_pretrained(folder, dtype=torch.float32)
    assert not any(isinstance(module, QuantizedWeight) for module in drafter.modules())


def test_only_where_there_is_one(folder, tmp_path):
    """A checkpoint without the module is taken for one with it, or two drafters for one."""
    write_tiny_checkpoint(tmp_path / "plain", with_dspark=False)
    with pytest.raises(ValueError, match="must hold a checkpoint with a DSpark module"):
        DSparkAssistantModel.from_pretrained(tmp_path / "plain")
    model = DeepseekV4DSparkForCausalLM.from_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="`use_dspark` must be left out"):
        model.generate(_prompts(1), use_dspark=True, max_new_tokens=2)
    model = DeepseekV4DSparkForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="`use_dspark` must be False beside"):
        model.generate(_prompts(1), use_dspark=True, assistant_model=model.dspark, max_new_tokens=2)


def test_after_saving_under_our_own_names(folder, tmp_path):
    """A checkpoint that was saved for fast loading has lost its drafter."""
    model = DeepseekV4DSparkForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path, released=False)
    again = DeepseekV4DSparkForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, expected), (_, found) in zip(
        model.dspark.named_parameters(), again.dspark.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("cache_dtype", [slow(None), "fp8"])
def test_rounds_its_keys_as_the_target_does(folder, cache_dtype):
    """The drafter of a target with an 8-bit cache keeps keys that it was not trained with, or text changes by them."""
    target = DeepseekV4DSparkForCausalLM.from_pretrained(folder, dtype=torch.float32, cache_dtype=cache_dtype)
    assert target.dspark.config.deepseek_v4.cache_dtype == cache_dtype
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = target.generate(_prompts(2), **options)
    assert torch.equal(target.generate(_prompts(2), use_dspark=True, scheduler="fixed", **options), plain)
    alone = DSparkAssistantModel.from_pretrained(folder, dtype=torch.float32, cache_dtype=cache_dtype)
    states = torch.randn(1, 3, target.config.hidden_size)
    keys = [
        drafter.layers[0].keys_and_values(states, drafter.rotary_emb(torch.arange(3)[None], torch.float32))[0]
        for drafter in (target.dspark, alone, DSparkAssistantModel.from_pretrained(folder, dtype=torch.float32))
    ]
    assert torch.equal(keys[0], keys[1])
    assert torch.equal(keys[0], keys[2]) == (cache_dtype is None)


def test_from_where_the_target_came(folder, tmp_path, monkeypatch):
    """The drafter is read from another folder or revision than its target, or fetched twice."""
    shutil.copytree(folder, tmp_path / "below")
    model = DeepseekV4DSparkForCausalLM.from_pretrained(tmp_path, subfolder="below", force_download=True)
    assert torch.equal(model.dspark.fc.scale, DSparkAssistantModel.from_pretrained(folder).fc.scale)

    # a hub with one revision, in the place of Transformers' access to it
    original, asked = reading.cached_file, []

    def cached_file(name, file, **options):
        assert name == "some/model"
        asked.append((file, options.pop("revision"), bool(options.get("force_download"))))
        return original(folder, file, **options)

    monkeypatch.setattr(hubs, "_is_reached", lambda: True)
    monkeypatch.setattr(reading, "cached_file", cached_file)
    monkeypatch.setattr(configuration_utils, "cached_file", cached_file)
    model = DeepseekV4DSparkForCausalLM.from_pretrained("some/model", revision="pinned", force_download=True)
    num_for_target = len(asked)
    assert model.dspark.fc.weight.shape[0] == model.config.hidden_size
    assert {revision for _, revision, _ in asked} == {"pinned"}
    assert not any(is_forced for _, _, is_forced in asked[num_for_target:])


@pytest.mark.parametrize("way", ["assistant_model", slow("custom_generate")])
def test_transformers_own_class_is_refused_with_advice(folder, way):
    """Whoever loads the target as usual reads that it is stateful, and not which class to load instead."""
    native, drafter = AutoModelForCausalLM.from_pretrained(folder), DSparkAssistantModel.from_pretrained(folder)
    options = {way: drafter if way == "assistant_model" else drafter.decode}
    with pytest.raises(
        ValueError, match=r"got 'DeepseekV4ForCausalLM'\. Load .*DeepseekV4DSparkForCausalLM\.from_pre"
    ):
        native.generate(_prompts(1), max_new_tokens=2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "flaot32"}, "`dtype` must be a floating-point dtype, got 'flaot32'. Leave it out"),
        ({"dtype": torch.int8}, "`dtype` must be a floating-point dtype, got torch.int8"),
        ({"device_map": "auto"}, "must be given `dtype`, .* got 'auto'"),
    ],
)
def test_arguments_are_checked(folder, options, message):
    """A misspelt dtype is passed over in silence."""
    with pytest.raises(ValueError, match=message):
        DSparkAssistantModel.from_pretrained(folder, **options)
