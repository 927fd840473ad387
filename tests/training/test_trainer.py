"""A drafter trained on its target's own text drafts well, and a run that was cut continues as if it had not been."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, TrainerCallback

from dspark_hf import DSparkAssistantModel
from dspark_hf.training.arguments import DSparkTrainingArguments
from dspark_hf.training.conversations import Conversation, ConversationDataset, collate
from dspark_hf.training.trainer import DSparkTrainer
from tests.reference.objective import OracleSlot, objective
from tests.thinning import slow
from tests.tiny import tiny_target


def _own_text(target: PreTrainedModel, count: int, length: int = 32) -> list[Conversation]:
    prompts = torch.randint(2, target.config.vocab_size, (count, 4))
    ids = target.generate(prompts, attention_mask=torch.ones_like(prompts), max_length=length, do_sample=True, top_k=0)
    mask = torch.arange(length) >= 4
    return [Conversation(row, mask) for row in ids]


def _trainer(
    folder: Path, target: PreTrainedModel, texts: list[Conversation], drafter_options: dict[str, Any], **options: Any
) -> DSparkTrainer:
    torch.manual_seed(5)
    drafter = DSparkAssistantModel.from_target(
        target, **{"num_hidden_layers": 1, "block_size": 4, "markov_rank": 8, **drafter_options}
    )
    options = {
        "per_device_train_batch_size": 2,
        "num_anchors": 8,
        "warmup_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 6e-4,
        **options,
    }
    return DSparkTrainer(drafter, target, DSparkTrainingArguments(str(folder), **options), texts[2:], texts[:2])


def _log(trainer: DSparkTrainer) -> list[dict[str, Any]]:
    return [record for record in trainer.state.log_history if "train_runtime" not in record]


class _Crash(TrainerCallback):
    """Stop a run as Ctrl-C would, before the checkpoint of a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", [slow("adamw"), "muon"])
def test_an_interrupted_run_continues_the_same(optimizer: str, tmp_path: Path) -> None:
    """A resumed run would see other data, another schedule or a fresh optimiser."""
    target = tiny_target()
    texts = _own_text(target, 9)
    options = {
        "drafter_optimizer": optimizer,
        "max_steps": 4,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "gradient_accumulation_steps": 2,
    }
    drafter_options = {"markov_head_type": "rnn", "draft_token_ids": range(2, 60)}
    whole = _trainer(tmp_path / "whole", target, texts, drafter_options, **options)
    whole.train()

    cut = _trainer(tmp_path / "cut", target, texts, drafter_options, **options)
    cut.add_callback(_Crash())
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    # as if the crash had come while a checkpoint was being written
    torn = tmp_path / "cut" / "checkpoint-3"
    torn.mkdir()
    shutil.copy(tmp_path / "cut" / "checkpoint-2" / "config.json", torn)
    (torn / "model.safetensors").write_bytes(b"half")
    resumed = _trainer(tmp_path / "cut", target, texts, drafter_options, **options)
    resumed.train()

    assert not torn.exists()
    assert _log(resumed) == _log(whole)
    assert [record["step"] for record in _log(whole) if "eval_loss" in record] == [1, 2, 3, 4]
    states = [trainer.model.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("head", "optimizer"), [("vanilla", "adamw"), slow("gated", "muon"), slow("rnn", "adamw")], ids=lambda value: value
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
        drafter_optimizer=optimizer,
        # the RNN head learns more slowly
        max_steps=120 if head == "rnn" else 60,
        per_device_train_batch_size=4,
        num_anchors=16,
        learning_rate=3e-2,
        save_strategy="no",
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    # decoding starts from them
    slots = range(1, 1 + trainer.model.config.block_size)
    assert trainer.model.config.accept_rates == [after[f"eval_accept_rate_{slot}"] for slot in slots]
    assert before["eval_expected_tau"] < 2
    assert after["eval_expected_tau"] > 2.8
    assert after["eval_loss"] < before["eval_loss"]
    # slot 0 sees the anchor from the start; the later ones learn nearly all they know
    assert all(after[f"eval_accept_rate_{k}"] > before[f"eval_accept_rate_{k}"] + 0.4 for k in (2, 3, 4))


@pytest.mark.parametrize("draft_token_ids", [None, range(2, 40)], ids=["all tokens", "few tokens"])
def test_the_loss_is_that_of_the_equations(draft_token_ids: range | None, tmp_path: Path) -> None:
    """Labels, previous tokens or target distributions would be shifted by a position."""
    target = tiny_target("gemma2")
    texts = _own_text(target, 3, length=12)
    trainer = _trainer(tmp_path, target, texts, {"draft_token_ids": draft_token_ids}, num_anchors=100)
    drafter, adapter = trainer.model, trainer.target
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
    weights = trainer.args.loss_weights
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
    evaluation = trainer.evaluate(ConversationDataset(texts[:1]))
    assert evaluation["eval_loss"] == pytest.approx(expected.total.item(), abs=1e-4)
    for k in range(4):
        rates = [expected.accept_rate[place] for place, slot in enumerate(slots) if slot.k == k]
        assert evaluation[f"eval_accept_rate_{k + 1}"] == pytest.approx(sum(rates) / len(rates), abs=1e-4)


def test_every_step_draws_new_blocks(tmp_path: Path) -> None:
    """Most positions of a conversation would never be trained on."""
    target = tiny_target()
    texts = _own_text(target, 3)
    # nothing is learnt and there is one conversation: only the blocks can change the loss
    options = {"learning_rate": 0.0, "per_device_train_batch_size": 1, "max_steps": 3, "save_strategy": "no"}
    trainer = _trainer(tmp_path, target, texts, {}, eval_strategy="steps", eval_steps=1, **options)
    trainer.train()
    assert len({record["loss"] for record in _log(trainer) if "loss" in record}) == 3
    assert len({record["eval_loss"] for record in _log(trainer) if "eval_loss" in record}) == 1


def test_padding_does_not_matter(tmp_path: Path) -> None:
    """Sequences of a batch would be trained on each other's length, states or labels."""
    target = tiny_target("gemma3_text")
    texts = [*_own_text(target, 1, length=12), *_own_text(target, 1, length=30), *_own_text(target, 1, length=21)]
    trainer = _trainer(tmp_path, target, texts, {"markov_head_type": "rnn"}, num_anchors=100)
    dataset = ConversationDataset(texts)
    together = trainer.evaluate(dataset)
    trainer.args.per_device_eval_batch_size = 1
    singly = trainer.evaluate(dataset)
    # the loss is a mean over batches, all else over blocks and slots
    names = [name for name in together if name != "eval_loss"]
    assert {name: together[name] for name in names} == pytest.approx({name: singly[name] for name in names}, abs=2e-4)


def test_accumulated_batches_weigh_like_one(tmp_path: Path) -> None:
    """Accumulation would change the size of the steps."""
    target = tiny_target()
    # of one length, so that batches have equally many slots
    texts = _own_text(target, 6)
    common = {
        "max_steps": 1,
        "save_strategy": "no",
        "num_anchors": 100,
        "warmup_steps": 0,
        "drafter_optimizer": "adamw",
    }
    states = []
    for size, count in ((2, 1), (1, 2)):
        trainer = _trainer(
            tmp_path, target, texts, {}, per_device_train_batch_size=size, gradient_accumulation_steps=count, **common
        )
        # gradients, not AdamW's signs of them
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        trainer.train(False)
        states.append(trainer.model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("draft_token_ids", [slow(None), range(2, 450)], ids=["all tokens", "few tokens"])
def test_vocabulary_sized_memory_does_not_grow(draft_token_ids: range | None, tmp_path: Path) -> None:
    """A long sequence would need memory for its length times the vocabulary."""
    target = tiny_target(vocab_size=499)
    sizes = {499, 448}
    rows: list[int] = []

    class Watch(TorchDispatchMode):
        """Note how many rows tensors with a vocabulary-sized last dimension have."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] in sizes:
                    rows.append(tensor.numel() // tensor.shape[-1])
            return output

    most = []
    for length in (120, 480):
        texts = [Conversation(torch.randint(2, 400, (length,)), torch.arange(length) > 3) for _ in range(3)]
        trainer = _trainer(
            tmp_path / str(length),
            target,
            texts,
            {"draft_token_ids": draft_token_ids},
            num_anchors=512,
            max_steps=1,
            save_strategy="no",
        )
        rows.clear()
        with Watch():
            loss = trainer.compute_loss(trainer.model, collate([trainer.train_dataset[0]]))
            loss.backward()
        most.append(max(rows))
    assert most[0] == most[1] <= 256


def test_the_best_checkpoint_is_kept_and_training_stops_early(tmp_path: Path) -> None:
    """Hours would go on after the held-out tau has stopped rising, or its best weights would be lost."""
    target = tiny_target()
    trainer = _trainer(
        tmp_path,
        target,
        _own_text(target, 6),
        {},
        # nothing is learnt, so nothing ever gets better
        learning_rate=0.0,
        max_steps=50,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        early_stopping_patience=3,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_global_step == 1


def test_a_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    """A run with a limit would run on, or lose what it did since the last checkpoint."""
    target = tiny_target()
    texts = _own_text(target, 6)
    options = {"max_steps": 2, "save_steps": 100, "eval_strategy": "steps", "eval_steps": 100}
    first = _trainer(tmp_path, target, texts, {}, max_minutes=1e-9, **options)
    first.train()
    assert first.state.global_step == 1
    assert first.best_tau > 1
    second = _trainer(tmp_path, target, texts, {}, **options)
    second.train()
    whole = _trainer(tmp_path / "whole", target, texts, {}, **options)
    whole.train()
    states = [trainer.model.state_dict() for trainer in (second, whole)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, slow({"compile_loss": True, "compile_drafter": True})],
    ids=str,
)
def test_ways_to_save_time_or_memory_change_nothing(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointed layers, a compiled loss or a compiled drafter would train another drafter."""
    # code that was compiled for other vector instructions is taken from a shared folder, and crashes
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    target = tiny_target()
    texts = _own_text(target, 6)
    common = {"max_steps": 2, "save_strategy": "no", "warmup_steps": 0}
    states = []
    for changes in ({}, options):
        trainer = _trainer(tmp_path, target, texts, {}, **common, **changes)
        # gradients, not AdamW's signs of them: where one is nearly zero, its sign is that of a rounding
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        begin = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.train(False)
        states.append(trainer.model.state_dict())
    assert max((tensor - begin[name]).abs().max() for name, tensor in states[0].items()) > 1e-3
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=1e-5, rtol=1e-4)


def test_the_target_is_left_alone(tmp_path: Path) -> None:
    """Training would change the target, or leave hooks on it that keep its states in memory."""
    target = tiny_target()
    before = {name: x.clone() for name, x in target.state_dict().items()}
    trainer = _trainer(tmp_path, target, _own_text(target, 5), {}, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert all(torch.equal(x, before[name]) for name, x in target.state_dict().items())
    assert not any(module._forward_hooks for module in target.modules())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_own_embeddings_stay_frozen(tmp_path: Path) -> None:
    """Fine-tuning a released drafter would move its copies of the target's embedding and head apart from them."""
    target = tiny_target()
    trainer = _trainer(tmp_path, target, _own_text(target, 5), {"owns_embeddings": True}, max_steps=1)
    names = ("embed_tokens.weight", "lm_head.weight")
    before = {name: trainer.model.state_dict()[name].clone() for name in names}
    trainer.train()
    assert all(torch.equal(trainer.model.state_dict()[name], before[name]) for name in names)


def test_the_confidence_head_alone(tmp_path: Path) -> None:
    """Drafts would change with the confidence, or the head would learn nothing."""
    target = tiny_target()
    texts = _own_text(target, 6)
    options = {"confidence_only": True, "learning_rate": 1e-2, "max_steps": 20, "save_strategy": "no"}
    trainer = _trainer(tmp_path, target, texts, {}, **options)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    loss = trainer.evaluate()["eval_loss_confidence"]
    # a fresh drafter has none; later ones, which may have been counted while it decoded, are not replaced
    assert trainer.model.config.accept_rates is not None
    counted = trainer.model.config.accept_rates = [0.25] * trainer.model.block_size
    # what cannot change is no part of the loss: at cold temperatures it would drown what can
    assert (trainer.args.loss_weights.ce, trainer.args.loss_weights.tv) == (0, 0)
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    assert trainer.evaluate()["eval_loss_confidence"] < loss
    assert trainer.model.config.accept_rates == counted
    # tau stays the same, so the first of several evaluations would be the best
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("eval_loss_confidence", False)
    with pytest.raises(ValueError, match="`confidence_only` must be False for a drafter without"):
        _trainer(tmp_path, target, texts, {"enable_confidence_head": False}, **options)


def test_a_drafter_is_trained_for_its_temperature(tmp_path: Path) -> None:
    """A drafter that will be used greedily is judged, and judges itself, by what sampling accepts."""
    target = tiny_target()
    texts = _own_text(target, 6)
    usual = _trainer(tmp_path / "usual", target, texts, {}).evaluate()
    greedy = _trainer(tmp_path / "greedy", target, texts, {}, confidence_only=True, temperature=0.0).evaluate()
    # argmax of a fresh drafter is seldom that of the target, which believes many tokens possible
    assert greedy["eval_accept_rate_1"] != pytest.approx(usual["eval_accept_rate_1"], abs=0.05)
    for temperature, remedy in ((0.1, "Only `confidence_only` can"), (-1.0, "Only"), (float("nan"), "Only")):
        with pytest.raises(ValueError, match=f"`temperature` must be at least 0.2 and finite, got .*{remedy}"):
            _trainer(tmp_path, target, texts, {}, temperature=temperature)
    with pytest.raises(ValueError, match="`temperature` must be at least 0.0 and finite, got -1.0"):
        _trainer(tmp_path, target, texts, {}, temperature=-1.0, confidence_only=True)


def test_evaluation_needs_texts(tmp_path: Path) -> None:
    """A run without held-out text would fail with a riddle."""
    target = tiny_target()
    trainer = _trainer(tmp_path, target, _own_text(target, 5), {})
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="`held_out` must hold conversations"):
        trainer.evaluate()


def test_texts_without_the_targets_words_are_refused(tmp_path: Path) -> None:
    """Training on nothing would end in a drafter at random."""
    target = tiny_target()
    texts = [Conversation(torch.arange(9), torch.zeros(9, dtype=torch.bool)) for _ in range(4)]
    with pytest.raises(ValueError, match="`conversations` must hold two of the target's own tokens in a row, got 2"):
        _trainer(tmp_path, target, texts, {})


def test_a_quantised_head_is_refused(tmp_path: Path) -> None:
    """The loss would read the packed numbers of a quantised head as if they were weights."""
    target = tiny_target()
    texts = _own_text(target, 5)
    target.lm_head.weight = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="`target` must have an output head in floating point"):
        _trainer(tmp_path, target, texts, {}, max_steps=1)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("drafter_optimizer", "sgd", r"be one of \('adamw', 'muon'\), got 'sgd'"),
        ("num_anchors", 0, "be at least 1, got 0"),
        ("state_cache_gb", -1.0, "be at least 0, got -1.0"),
        ("max_minutes", 0.0, "be above 0, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(name: str, value: Any, rule: str, tmp_path: Path) -> None:
    """A misspelt optimiser would train with another one; an empty step would learn nothing."""
    with pytest.raises(ValueError, match=f"`{name}` must {rule}"):
        DSparkTrainingArguments(str(tmp_path), **{name: value})


class _Failure(TrainerCallback):
    """Fail in the middle of a run."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("in the middle")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_run_tells_how_far_it_is(
    is_terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run says nothing, or its bar stays on the screen and the cursor away when the run fails."""
    monkeypatch.setenv("TERM", "xterm-256color")
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    target = tiny_target()
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "max_steps": 3}
    trainer = _trainer(tmp_path, target, _own_text(target, 9), {}, disable_tqdm=False, **steps)
    trainer.add_callback(_Failure())
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.train()
    shown = capfd.readouterr().err
    assert re.search(r"step 1: held-out tau 1\.\d+ \(teacher-forced\), accept rates 0\.\d", shown)
    if is_terminal:
        assert "training" in shown and "2/3" in shown and "held-out 1." in shown
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    else:
        assert "training: 2 of 3; loss " in shown and "\x1b" not in shown
