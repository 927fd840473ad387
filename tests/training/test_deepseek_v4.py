"""A DeepSeek-V4 learns a language with Muon, and its drafter learns to speak it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from dspark_hf import DeepseekV4DSparkForCausalLM, DSparkAssistantModel
from dspark_hf.training.arguments import DSparkTrainingArguments
from dspark_hf.training.conversations import Conversation
from dspark_hf.training.optimizers import MuonAdamW, split_parameters
from dspark_hf.training.trainer import DSparkTrainer
from tests.modeling.deepseek_v4.tiny import tiny_config
from tests.training.tiny_language import RECALL, VOCAB_SIZE, bigram_entropy, slip_entropy, write_texts

LENGTH = 64
MASK_TOKEN = VOCAB_SIZE - 1
PLAIN = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


def _fresh_target() -> DeepseekV4DSparkForCausalLM:
    torch.manual_seed(0)
    config = tiny_config(
        vocab_size=VOCAB_SIZE,
        initializer_range=0.05,
        index_n_heads=8,
        index_topk=4,
        output_router_logits=True,
        indexer_loss_coef=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return DeepseekV4DSparkForCausalLM(config)


def _train_target(model: DeepseekV4DSparkForCausalLM, folder: Path, num_steps: int, batch_size: int) -> Trainer:
    """Train as a user would: Transformers' `Trainer` with our optimiser."""
    texts = write_texts(num_steps * batch_size, LENGTH, seed=0)
    args = TrainingArguments(
        str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        **PLAIN,
    )
    optimizer = MuonAdamW(*split_parameters(model), lr=args.learning_rate)
    dataset: Any = [{"input_ids": row, "labels": row} for row in texts]
    trainer = Trainer(model, args, train_dataset=dataset, optimizers=(optimizer, None))
    trainer.train()
    return trainer


def _losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@torch.no_grad()
def _surprise(model: DeepseekV4DSparkForCausalLM, texts: Tensor) -> Tensor:
    """Return the nats `(B, T - 1)` of every token but the first."""
    logits = model.eval()(texts).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), texts[:, 1:], reduction="none")


def _own_texts(target: DeepseekV4DSparkForCausalLM, count: int, seed: int, length: int = LENGTH) -> list[Conversation]:
    prompts = write_texts(count, 4, seed)
    torch.manual_seed(seed)
    texts = target.generate(prompts, max_length=length, do_sample=True, top_k=0, eos_token_id=None)
    return [Conversation(row, torch.arange(length) >= 4) for row in texts]


def _train_drafter(
    target: DeepseekV4DSparkForCausalLM, folder: Path, num_steps: int, texts: list[Conversation], **options: Any
) -> DSparkTrainer:
    torch.manual_seed(1)
    drafter = DSparkAssistantModel.from_target(target, block_size=4, markov_rank=16, mask_token_id=MASK_TOKEN)
    args = DSparkTrainingArguments(
        str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=8,
        num_anchors=16,
        learning_rate=1e-2,
        **PLAIN,
        **options,
    )
    return DSparkTrainer(drafter, target, args, texts[8:], texts[:8])


def test_a_few_steps(tmp_path: Path) -> None:
    """Muon, the extra losses or the drafter's stages would not train, or training would change what is no weight."""
    target = _fresh_target()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    special = {name: getattr(target.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    losses = _losses(_train_target(target, tmp_path, num_steps=6, batch_size=4))
    assert losses[0] > 3.5
    assert losses[-1] < losses[0] - 0.5
    changed = {name for name, tensor in target.state_dict().items() if not torch.equal(tensor, before[name])}
    kept = {name for name in before if name.endswith((".tid2eid", ".gate.bias"))}
    assert changed == before.keys() - kept
    assert {name: getattr(target.config, f"{name}_token_id") for name in special} == special

    target.config.output_router_logits = False
    trainer = _train_drafter(target, tmp_path, 3, _own_texts(target, 12, seed=2, length=14))
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    first = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first["eval_loss"]
    kept = {name for name in weights if name.endswith(".gate.bias")}
    trained = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert trained == weights.keys() - kept
    assert trainer.model.config.mask_token_id == MASK_TOKEN


@pytest.mark.slow
def test_a_target_and_its_drafter_learn_a_language(tmp_path: Path) -> None:
    """A V4 trained from scratch would not learn, or its drafter would save no passes of the target."""
    target = _fresh_target()
    _train_target(target, tmp_path / "target", num_steps=110, batch_size=16)
    unseen = write_texts(64, LENGTH, seed=1)
    surprise = _surprise(target, unseen)
    late = surprise[:, 4:].mean().item()
    # the last token alone does not tell the topic
    assert late < 0.6 * bigram_entropy(write_texts(2000, LENGTH, seed=3)[:, 4:])
    assert late > slip_entropy() * 0.8
    # which of eight names it was, further back than the window is wide where it is asked for the first time
    is_recall = unseen[:, :-1] == RECALL
    recalled = surprise[is_recall & (is_recall.cumsum(1) == 1)]
    assert len(recalled) > 50
    assert recalled.mean() < 1.0

    prompts = write_texts(8, 6, seed=4)
    options = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None}
    plain = target.generate(prompts, **options)
    trainer = _train_drafter(target, tmp_path / "drafter", 90, _own_texts(target, 136, seed=2))
    drafter = trainer.model
    # whole blocks: the default may find that plain steps of so small a target are faster
    options |= {"drafts": "model", "scheduler": "fixed"}
    assert torch.equal(target.generate(prompts, assistant_model=drafter, **options), plain)
    untrained = drafter.last_statistics.tau
    trainer.train()
    drafter.eval()
    assert torch.equal(target.generate(prompts, assistant_model=drafter, **options), plain)
    tau = drafter.last_statistics.tau
    assert untrained < 1.5 < tau
