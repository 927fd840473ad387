"""Any target that generation supports can be trained for: families, the language part of a VLM, quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from dspark_hf import DSparkAssistantModel
from dspark_hf.training.arguments import DSparkTrainingArguments
from dspark_hf.training.conversations import Conversation
from dspark_hf.training.recipe import PRESETS, build_drafter
from dspark_hf.training.trainer import DSparkTrainer
from tests.thinning import mostly_slow
from tests.tiny import FAMILIES, tiny_config, tiny_target


def _train(target: PreTrainedModel, folder: Path, **options: Any) -> DSparkTrainer:
    generator = torch.Generator().manual_seed(3)
    texts = [
        Conversation(torch.randint(2, 60, (length,), generator=generator), torch.arange(length) > 3)
        for length in (20, 14, 24, 17)
    ]
    torch.manual_seed(0)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, block_size=4, markov_rank=8)
    arguments = DSparkTrainingArguments(
        str(folder),
        **{
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "num_anchors": 30,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **options,
        },
    )
    trainer = DSparkTrainer(drafter.float(), target, arguments, texts, texts)
    trainer.train(False)
    return trainer


def _learns(trainer: DSparkTrainer) -> bool:
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return losses[-1] < losses[0]


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ("gemma4_text",)))
def test_families(family: str, tmp_path: Path) -> None:
    """A family whose head, embedding or layers are built otherwise could not be trained for."""
    target = tiny_target(family)
    trainer = _train(target, tmp_path, logging_steps=5)
    assert _learns(trainer)
    drafter = trainer.model.eval()
    prompt = torch.tensor([[5, 9, 7]])
    plain = target.generate(prompt, max_new_tokens=10, do_sample=False)
    assert torch.equal(plain, target.generate(prompt, max_new_tokens=10, do_sample=False, assistant_model=drafter))


def test_the_language_part_of_a_vision_language_model(tmp_path: Path) -> None:
    """Vision-language models, whose decoder lies deeper, could not be trained for."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = LlavaConfig(vision_config=vision, text_config=tiny_config("llama").to_dict(), image_token_index=63)
    torch.manual_seed(1)
    assert _learns(_train(LlavaForConditionalGeneration(config).eval(), tmp_path, logging_steps=5))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"load_in_8bit": True, "llm_int8_threshold": 0.0}, id="8 bits", marks=pytest.mark.slow),
        pytest.param({"load_in_4bit": True}, id="4 bits"),
    ],
)
def test_quantised_targets(options: dict[str, Any], tmp_path: Path) -> None:
    """A target that only fits in 8 or 4 bits could not be trained for."""
    tiny_target(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path / "target")
    quantisation = BitsAndBytesConfig(**options, llm_int8_skip_modules=["lm_head"])
    target = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", quantization_config=quantisation, device_map={"": "cpu"}
    )
    assert _learns(_train(target, tmp_path / "run", logging_steps=5))


def test_mixed_precision_trains_weights_in_fp32(tmp_path: Path) -> None:
    """Weights in bf16 would lose small updates; products in fp32 would be slow."""
    trainer = _train(tiny_target().to(torch.bfloat16), tmp_path, logging_steps=5, bf16=True)
    assert _learns(trainer)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen3_moe"])
def test_layers_that_cannot_be_copied_need_no_option(family: str) -> None:
    """`dspark-hf train` refuses a target, unless told otherwise, for a start that would not even help."""
    assert not PRESETS["small"]["warm_start"]
    drafter = build_drafter(tiny_target(family), [], layers=1, markov_rank=4, draft_vocab=None)
    assert drafter.config.use_qk_norm
