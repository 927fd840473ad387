"""A policy drafts while it is trained, and its drafter learns what it says by now."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from dspark_hf import DSparkAssistantModel
from dspark_hf.training.rollouts import RolloutDrafter
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target

CONFIG = GenerationConfig(max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=[9])


def _args(**changes: Any) -> SimpleNamespace:
    values = {"world_size": 1, "bf16": False, "fp16": False, "use_cpu": True, "gradient_accumulation_steps": 1}
    return SimpleNamespace(**{**values, **changes})


def _drafter(policy: Any) -> DSparkAssistantModel:
    torch.manual_seed(0)
    return DSparkAssistantModel.from_target(policy, num_hidden_layers=1, markov_rank=8, block_size=4)


def _steps(policy: Any, drafts: RolloutDrafter, count: int, inputs: Any, model: Any = None) -> list[torch.Tensor]:
    state, texts = SimpleNamespace(global_step=0), []
    drafts.on_train_begin(_args(), state, None, model=model or policy)
    for _ in range(count):
        # the default would not draft for long from a random drafter
        texts.append((model or policy).generate(**inputs, generation_config=CONFIG, scheduler="fixed"))
        state.global_step += 1
        drafts.on_step_end(_args(), state, None)
    drafts.on_train_end(_args(), state, None)
    return texts


def test_an_adapted_drafter_keeps_up() -> None:
    """Rollouts say something else with a drafter, adapting is of no use, or it changes the policy that is trained."""
    policy = tiny_target().train()
    policy.model.embed_tokens.weight.requires_grad_(False)
    before = copy.deepcopy(policy.state_dict())
    inputs = ragged_prompts(4)
    plain = policy.generate(**inputs, generation_config=CONFIG)
    options = {"adapt_steps": 40, "learning_rate": 2e-2, "num_anchors": 32}
    taus = {}
    for adapt_every in (None, 2):
        drafts = RolloutDrafter(_drafter(policy), adapt_every=adapt_every, **options)
        for text in _steps(policy, drafts, 3, inputs):
            assert torch.equal(text, plain)
        assert len(drafts.records) == 4
        taus[adapt_every] = [record.tau for record in drafts.records[:3]]
    assert taus[None][-1] == pytest.approx(taus[None][0], abs=0.3)
    assert taus[2][-1] > 1.4 * taus[None][-1]
    # the policy is as its trainer left it
    assert "generate" not in vars(policy)
    assert policy.training
    assert [name for name, one in policy.named_parameters() if not one.requires_grad] == ["model.embed_tokens.weight"]
    assert all(torch.equal(policy.state_dict()[name], x) for name, x in before.items())


def test_only_what_was_written_is_learnt() -> None:
    """A drafter learns padding, or what stands behind the end of an answer."""
    policy = tiny_target()
    drafts = RolloutDrafter(_drafter(policy), adapt_every=100)
    inputs = ragged_prompts(3)
    (text,) = _steps(policy, drafts, 1, inputs)
    length = inputs["input_ids"].shape[1]
    for kept, row, mask in zip(drafts._texts, text, inputs["attention_mask"], strict=True):
        own = row[length:].tolist()
        own = own[: own.index(9) + 1] if 9 in own else own
        assert kept.input_ids.tolist() == [*row[:length][mask.bool()].tolist(), *own]
        assert int(kept.loss_mask.sum()) == len(own)


def test_an_assistant_that_was_asked_for_goes_before() -> None:
    """Evaluation inside training drafts with another drafter than it was given."""
    policy = tiny_target()
    drafts, other = RolloutDrafter(_drafter(policy)), _drafter(policy)
    drafts.on_train_begin(_args(), SimpleNamespace(global_step=0), None, model=policy)
    output = policy.generate(
        **ragged_prompts(1), generation_config=CONFIG, assistant_model=other, return_dict_in_generate=True
    )
    assert output.statistics.num_rounds > 0
    assert drafts.records[-1].num_rounds == 0
    drafts.on_train_end(_args(), None, None)


def test_adapters_are_policies() -> None:
    """A policy that is trained by LoRA generates without the drafter."""
    peft = pytest.importorskip("peft")
    policy = tiny_target()
    tuned = peft.get_peft_model(policy, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    drafts = RolloutDrafter(_drafter(policy), adapt_every=1, adapt_steps=1)
    plain = tuned.generate(**ragged_prompts(2), generation_config=CONFIG)
    (text,) = _steps(policy, drafts, 1, ragged_prompts(2), model=tuned)
    assert torch.equal(text, plain)
    assert drafts.records[0].num_rounds > 0
    assert {name.split(".")[-3] for name, one in tuned.named_parameters() if one.requires_grad} == {"lora_A", "lora_B"}


def test_what_cannot_be_adapted_is_refused() -> None:
    """Drafters of several processes drift apart without a word."""
    policy = tiny_target()
    with pytest.raises(ValueError, match="`adapt_every` must be at least 1, got 0"):
        RolloutDrafter(_drafter(policy), adapt_every=0)
    with pytest.raises(ValueError, match="`adapt_every` must be None where several processes train, got 5 with 2"):
        RolloutDrafter(_drafter(policy), adapt_every=5).on_train_begin(_args(world_size=2), None, None, model=policy)
