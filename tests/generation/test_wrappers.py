"""Models that come wrapped, unloaded, as a name, or in each other's place."""

from __future__ import annotations

import pytest
import torch

from dspark_hf import DSparkAssistantModel, DSparkConfig, Request, generate_stream
from dspark_hf.generation.call import names
from dspark_hf.generation.wrappers import unwrap
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target

OPTIONS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def target():
    return tiny_target()


@pytest.fixture
def drafter(target):
    return DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)


def _streamed(target, drafter):
    prompt = ragged_prompts(1)["input_ids"]
    (finished,) = generate_stream(target, [Request(prompt[0], OPTIONS)], drafter=drafter)
    assert finished.error is None
    return finished.token_ids[None]


def test_compiled_drafter(target, drafter):
    """A compiled drafter is taken for another kind of assistant, or has no configuration to ask."""
    inputs = ragged_prompts(3)
    plain = target.generate(**inputs, **OPTIONS)
    compiled = torch.compile(drafter)
    assert unwrap(compiled) is drafter
    for options in ({}, {"scheduler": "fixed"}):
        assert torch.equal(target.generate(**inputs, **OPTIONS, assistant_model=compiled, **options), plain)
    assert drafter.last_statistics.num_drafted > 0
    alone = target.generate(ragged_prompts(1)["input_ids"], **OPTIONS)
    assert torch.equal(_streamed(target, compiled), alone)


def test_compiled_target(target, drafter):
    """A compiled target has no decoder layers, or takes no positions."""
    compiled = torch.compile(target)
    inputs = ragged_prompts(3)
    plain = target.generate(**inputs, **OPTIONS)
    assert torch.equal(compiled.generate(**inputs, **OPTIONS, assistant_model=drafter), plain)
    assert torch.equal(_streamed(compiled, drafter), target.generate(ragged_prompts(1)["input_ids"], **OPTIONS))
    assert DSparkAssistantModel.from_target(compiled, num_hidden_layers=1).config.vocab_size == 64


def test_adapters_in_layers(target, drafter):
    """A target or a drafter with adapters is known by its wrapper, which has none of what is asked for."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted, adapted_drafter = peft.get_peft_model(target, config), peft.get_peft_model(drafter, config)
    inputs = ragged_prompts(3)
    plain = adapted.generate(**inputs, **OPTIONS)
    assert torch.equal(adapted.generate(**inputs, **OPTIONS, assistant_model=adapted_drafter), plain)
    alone = adapted.generate(input_ids=ragged_prompts(1)["input_ids"], **OPTIONS)
    assert torch.equal(_streamed(adapted, adapted_drafter), alone)
    prompted = peft.get_peft_model(tiny_target(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert unwrap(prompted) is prompted
    with pytest.raises(TypeError, match="`target` must be a causal LM of Transformers, got PeftModelForCausalLM"):
        DSparkAssistantModel.from_target(prompted)
    with pytest.raises(ValueError, match="`target` must .* got PeftModelForCausalLM"):
        generate_stream(prompted, [], drafter=drafter)


def test_an_adapter_for_each_row(target, drafter):
    """A row goes on with another row's adapter, or the call ends in an error, once one of them is over."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(target, config)
    adapted.add_adapter("other", config)
    adapted.eval()
    options = {**OPTIONS, "max_new_tokens": 24, "eos_token_id": list(range(20, 26)), "pad_token_id": 0}
    options["adapter_names"] = ["default", "other", "default", "other"]
    inputs = ragged_prompts(4)
    plain = adapted.generate(**inputs, **options)
    num_ends = (plain == 0).sum(-1)
    # rows end at several places, and the adapters matter
    assert len(set(num_ends.tolist())) > 2
    assert not torch.equal(adapted.generate(**inputs, **{**options, "adapter_names": ["other"] * 4}), plain)
    assert torch.equal(adapted.generate(**inputs, **options, assistant_model=drafter, scheduler="fixed"), plain)
    del options["adapter_names"]
    with pytest.raises(ValueError, match="`alora_offsets` must be None when a drafter assists"):
        adapted.generate(**inputs, **options, alora_offsets=[2] * 4, assistant_model=drafter)


def test_a_name_that_nobody_loads(target, monkeypatch):
    """The name of a folder fails for want of a configuration where the decoding loop is used alone."""
    monkeypatch.setattr(names, "_FINDERS", [])
    with pytest.raises(TypeError, match=r"`assistant_model` must be a model, got the name .*from_pretrained\("):
        target.generate(**ragged_prompts(1), **OPTIONS, assistant_model="folder")


def test_roles_swapped(target, drafter):
    """A drafter that is asked to write says that it has no such method."""
    with pytest.raises(TypeError, match=r"on the target, got a drafter. Swap them: `target\.generate\("):
        drafter.generate(**ragged_prompts(1), assistant_model=target)
    assert not drafter.can_generate()


def test_drafter_without_weights(target):
    """A drafter whose weights were never loaded fails in the middle of the first round."""
    fields = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "markov_rank": 4}
    with torch.device("meta"):
        unloaded = DSparkAssistantModel(DSparkConfig(**fields))
    with pytest.raises(ValueError, match="`assistant_model` must hold its weights on a device, got .* on 'meta'"):
        target.generate(**ragged_prompts(1), **OPTIONS, assistant_model=unloaded)
