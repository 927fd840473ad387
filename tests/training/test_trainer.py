"""A drafter trained on its target's own text drafts well, and a run that was cut continues as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.target import TargetAdapter
from dspark_hf.training.data import Conversation
from dspark_hf.training.states import StateSource
from dspark_hf.training.trainer import DrafterTrainer, TrainingOptions
from tests.reference.objective import OracleSlot, objective
from tests.tiny import tiny_target


def _own_text(target: PreTrainedModel, count: int, length: int = 32) -> list[Conversation]:
    prompts = torch.randint(2, target.config.vocab_size, (count, 4))
    ids = target.generate(prompts, attention_mask=torch.ones_like(prompts), max_length=length, do_sample=True, top_k=0)
    mask = torch.arange(length) >= 4
    return [Conversation(row, mask) for row in ids]


def _trainer(
    folder: Path, target: PreTrainedModel, texts: list[Conversation], drafter_options: dict[str, Any], **options: Any
) -> DrafterTrainer:
    torch.manual_seed(5)
    drafter = DSparkAssistantModel.from_target(
        target, **{"num_hidden_layers": 1, "block_size": 4, "markov_rank": 8, **drafter_options}
    )
    options = {
        "dtype": torch.float32,
        "sequences_per_step": 2,
        "anchors_per_sequence": 8,
        "warmup_steps": 2,
        **options,
    }
    return DrafterTrainer(drafter, target, texts[2:], texts[:2], folder, TrainingOptions(**options))


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_continues_the_same(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run would see other data, another schedule or a fresh optimiser."""
    target = tiny_target()
    texts = _own_text(target, 7)
    options = {"optimizer": optimizer, "max_steps": 6, "save_steps": 2, "eval_steps": 1}
    drafter_options = {"markov_head_type": "rnn", "draft_token_ids": range(2, 60)}
    whole = _trainer(tmp_path / "whole", target, texts, drafter_options, **options)
    whole.train()

    cut = _trainer(tmp_path / "cut", target, texts, drafter_options, **options)
    evaluate = cut.evaluate

    def crash_at_step_five() -> dict[str, Any]:
        if cut.step == 5:
            raise KeyboardInterrupt
        return evaluate()

    monkeypatch.setattr(cut, "evaluate", crash_at_step_five)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert not (tmp_path / "cut" / "drafter").exists()
    resumed = _trainer(tmp_path / "cut", target, texts, drafter_options, **options)
    summary = resumed.train()

    assert _log(tmp_path / "cut") == _log(tmp_path / "whole")
    assert [record["step"] for record in _log(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    assert summary == _log(tmp_path / "whole")[-1]["held_out"]
    states = [trainer.drafter.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    saved = DSparkAssistantModel.from_pretrained(tmp_path / "cut" / "drafter").state_dict()
    assert all(torch.equal(saved[name], states[0][name]) for name in saved)


@pytest.mark.parametrize(
    ("head", "optimizer"), [("vanilla", "adamw"), ("gated", "muon"), ("rnn", "adamw")], ids=lambda value: value
)
def test_training_raises_the_accepted_length(head: str, optimizer: str, tmp_path: Path) -> None:
    """The trainer would not teach: drafts of a trained drafter would be accepted no more often."""
    target = tiny_target(vocab_size=32)
    with torch.no_grad():
        # the next token follows mostly from the last one: a random deep function cannot be learnt in seconds
        target.get_input_embeddings().weight.mul_(100)
    trainer = _trainer(
        tmp_path,
        target,
        _own_text(target, 66),
        {"markov_head_type": head, "markov_rank": 16},
        optimizer=optimizer,
        max_steps=100,
        sequences_per_step=4,
        anchors_per_sequence=16,
        learning_rate=3e-2,
        eval_steps=1000,
    )
    before = trainer.evaluate()
    after = trainer.train()
    assert before["expected_tau"] < 2
    assert after["expected_tau"] > 2.8
    assert after["loss"] < before["loss"]
    # slot 0 sees the anchor from the start; the later ones learn nearly all they know
    assert all(
        late > early + 0.4 for early, late in zip(before["accept_rate"][1:], after["accept_rate"][1:], strict=True)
    )


@pytest.mark.parametrize("draft_token_ids", [None, range(2, 40)], ids=["all tokens", "few tokens"])
def test_the_loss_is_that_of_the_equations(draft_token_ids: range | None, tmp_path: Path) -> None:
    """Labels, previous tokens or target distributions would be shifted by a position."""
    target = tiny_target("gemma2")
    texts = _own_text(target, 3, length=12)
    trainer = _trainer(tmp_path, target, texts, {"draft_token_ids": draft_token_ids}, anchors_per_sequence=100)
    trainer.held_out = texts[:1]
    drafter, adapter = trainer.drafter, trainer.target
    ids = texts[0].input_ids.tolist()
    with torch.no_grad(), adapter:
        target(texts[0].input_ids[None])
        context = adapter.pop_context_hidden_states().to(torch.bfloat16).float()
        last = target.get_decoder()(texts[0].input_ids[None]).last_hidden_state[0].to(torch.bfloat16).float()
        believed = adapter.head(last).double()
    draft_ids = list(range(64)) if draft_token_ids is None else list(draft_token_ids)
    draft_logits, confidence, slots = [], [], []
    for anchor in range(4, 11):
        previous = [ids[min(anchor + k, 11)] for k in range(4)]
        with torch.no_grad():
            output = drafter(
                context, torch.tensor([[ids[anchor]]]), torch.tensor([[anchor]]), torch.tensor([[previous]]), adapter
            )
            logits = adapter.head(output.hidden_states)[..., draft_ids] + drafter.markov_head.project(output.latents)
        for k in range(min(4, 11 - anchor)):
            draft_logits.append(logits[0, 0, k].double())
            confidence.append(output.confidence_logits[0, 0, k].double())
            # the target's row at the token before says what it believes of this one
            slots.append(OracleSlot(k, True, ids[anchor + k + 1], believed[anchor + k]))
    weights = trainer.options.loss
    expected = objective(
        draft_logits,
        confidence,
        slots,
        draft_ids,
        ce=weights.ce,
        tv=weights.tv,
        confidence=weights.confidence,
        decay=weights.decay,
    )
    evaluation = trainer.evaluate()
    assert evaluation["loss"] == pytest.approx(expected.total.item(), abs=1e-4)
    for k, rate in enumerate(evaluation["accept_rate"]):
        rates = [expected.accept_rate[place] for place, slot in enumerate(slots) if slot.k == k]
        assert rate == pytest.approx(sum(rates) / len(rates), abs=1e-4)


def test_every_step_draws_new_blocks(tmp_path: Path) -> None:
    """Most positions of a conversation would never be trained on."""
    target = tiny_target()
    texts = _own_text(target, 3)
    # nothing is learnt and there is one conversation: only the blocks can change the loss
    options = {"learning_rate": 0.0, "sequences_per_step": 1, "max_steps": 3, "eval_steps": 1}
    _trainer(tmp_path, target, texts, {}, **options).train()
    assert len({record["train"]["loss"] for record in _log(tmp_path)}) == 3
    assert len({record["held_out"]["loss"] for record in _log(tmp_path)}) == 1


def test_the_target_is_left_alone(tmp_path: Path) -> None:
    """Training would change the target, or leave hooks on it that keep its states in memory."""
    target = tiny_target()
    before = {name: x.clone() for name, x in target.state_dict().items()}
    trainer = _trainer(tmp_path, target, _own_text(target, 5), {}, max_steps=2, eval_steps=1)
    trainer.train()
    assert all(torch.equal(x, before[name]) for name, x in target.state_dict().items())
    assert not any(module._forward_hooks for module in target.modules())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_own_embeddings_stay_frozen(tmp_path: Path) -> None:
    """Fine-tuning a released drafter would move its copies of the target's embedding and head apart from them."""
    target = tiny_target()
    trainer = _trainer(tmp_path, target, _own_text(target, 5), {"owns_embeddings": True}, max_steps=1)
    names = ("embed_tokens.weight", "lm_head.weight")
    before = {name: trainer.drafter.state_dict()[name].clone() for name in names}
    trainer.train()
    assert all(torch.equal(trainer.drafter.state_dict()[name], before[name]) for name in names)


def test_no_held_out_texts(tmp_path: Path) -> None:
    """A run without an evaluation would fail at its end."""
    target = tiny_target()
    trainer = _trainer(tmp_path, target, _own_text(target, 5), {}, max_steps=1)
    trainer.held_out = []
    assert trainer.train() == {}


def test_a_quantised_head_is_refused(tmp_path: Path) -> None:
    """The loss would read the packed numbers of a quantised head as if they were weights."""
    target = tiny_target()
    texts = _own_text(target, 5)
    target.lm_head.weight = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="`target` must have an output head in floating point"):
        _trainer(tmp_path, target, texts, {}, max_steps=1)


def test_unknown_optimizers_are_refused() -> None:
    """A misspelt optimiser would train with another one."""
    with pytest.raises(ValueError, match="`optimizer` must be 'adamw' or 'muon', got 'sgd'"):
        TrainingOptions(optimizer="sgd")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_states_are_those_of_the_target(family: str) -> None:
    """Drafters would learn from other layers, or from another distribution than the target's."""
    target = tiny_target(family)
    adapter = TargetAdapter(target, [0])
    ids = torch.randint(2, 60, (9,))
    states = StateSource(adapter, dtype=torch.float32, max_cache_bytes=0).get(0, ids)
    with torch.no_grad():
        output = target(ids[None], output_hidden_states=True)
    torch.testing.assert_close(states.context.float(), output.hidden_states[1][0], atol=0.02, rtol=0.01)
    probs = (adapter.head(states.last.float()) - states.lse[:, None]).exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(probs, output.logits[0].softmax(-1), atol=0.02, rtol=0)


def test_states_are_remembered_up_to_the_limit() -> None:
    """Memory would grow without a limit, or every epoch would run the target again."""
    target = tiny_target()
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    target.get_decoder().register_forward_hook(count)
    ids = torch.randint(2, 60, (3, 9))
    one = 9 * (32 + 32) * 2 + 9 * 4
    source = StateSource(TargetAdapter(target, [0]), dtype=torch.float32, max_cache_bytes=2 * one)
    for _ in range(2):
        for index in range(3):
            states = source.get(index, ids[index])
            assert states.num_bytes == one
    # two fit; the third is computed anew
    assert runs == 4
