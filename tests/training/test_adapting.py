"""A drafter of any packaging goes on with another target, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.loading import load_drafter
from dspark_hf.modeling.provenance import fingerprint
from dspark_hf.modeling.vocabulary import choose_vocabulary
from dspark_hf.training.adapting import adapt_drafter, proposable_share
from dspark_hf.training.arguments import DSparkTrainingArguments
from dspark_hf.training.conversations import Conversation
from dspark_hf.training.trainer import DSparkTrainer
from tests.modeling.deepspec_layout import VOCAB_SIZE, Layout, deepspec_fields, deepspec_weights
from tests.modeling.formats.gguf_files import write_gguf
from tests.modeling.formats.layouts import (
    DRAFT_IDS,
    reduced,
    specforge_fields,
    speculators_fields,
    without_vocabulary,
    write,
)
from tests.thinning import mostly_slow, slow
from tests.tiny import tiny_target

GROWN = VOCAB_SIZE + 8
WEIGHTS = deepspec_weights(Layout())
GEMMA = Layout("gemma4")
PACKAGINGS: dict[str, Callable[[Path], Path]] = {
    "DeepSpec": lambda folder: write(folder, deepspec_fields(Layout()), WEIGHTS),
    "DeepSpec, Gemma": lambda folder: write(folder, deepspec_fields(GEMMA), deepspec_weights(GEMMA)),
    "DeepSpec without head": lambda folder: write(
        folder, deepspec_fields(Layout()), {name: x for name, x in WEIGHTS.items() if name != "lm_head.weight"}
    ),
    "speculators": lambda folder: write(folder, speculators_fields(), without_vocabulary(WEIGHTS)),
    "speculators, reduced": lambda folder: write(folder, speculators_fields(len(DRAFT_IDS)), reduced(WEIGHTS)),
    "SpecForge": lambda folder: write(folder, specforge_fields(), without_vocabulary(WEIGHTS)),
    "GGUF": lambda folder: write_gguf(folder / "drafter.gguf", WEIGHTS),
}


def _target(**options: Any) -> Any:
    return tiny_target("qwen3", **{"vocab_size": VOCAB_SIZE, "num_hidden_layers": 6, **options})


def _texts(vocab_size: int = VOCAB_SIZE) -> list[Conversation]:
    generator = torch.Generator().manual_seed(3)
    return [
        Conversation(torch.randint(2, vocab_size, (length,), generator=generator), torch.arange(length) > 3)
        for length in (20, 14, 24, 17)
    ]


def _trainer(drafter: DSparkAssistantModel, target: Any, folder: Path, **options: Any) -> DSparkTrainer:
    arguments = DSparkTrainingArguments(
        str(folder),
        **{
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "num_anchors": 30,
            "learning_rate": 5e-3,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 6,
            **options,
        },
    )
    texts = _texts(target.config.vocab_size)
    return DSparkTrainer(drafter, target, arguments, texts, texts)


def _check_drafts_exactly(drafter: DSparkAssistantModel, target: Any) -> None:
    prompt = torch.tensor([[5, 9, 7]])
    plain = target.generate(prompt, max_new_tokens=10, do_sample=False)
    options = {"assistant_model": drafter.eval(), "scheduler": "fixed"}
    assert torch.equal(plain, target.generate(prompt, max_new_tokens=10, do_sample=False, **options))


@pytest.mark.parametrize("name", mostly_slow(PACKAGINGS, ("speculators, reduced", "GGUF")))
def test_every_packaging_goes_on_with_a_grown_target(name: str, tmp_path: Path) -> None:
    """Somebody's drafter cannot be adapted: it does not load, fit new tokens, learn, or come back from a folder."""
    target = _target(vocab_size=GROWN)
    path = PACKAGINGS[name](tmp_path / "theirs")
    drafter = adapt_drafter(load_drafter(str(path), dtype="bfloat16"), target, _texts())
    assert drafter.dtype == torch.float32
    assert drafter.config.vocab_size == GROWN
    assert drafter.config.target_fingerprint == fingerprint(TargetAdapter(target))
    if drafter.config.owns_embeddings:
        rows = target.get_input_embeddings().weight[VOCAB_SIZE:]
        torch.testing.assert_close(drafter.embed_tokens.weight[VOCAB_SIZE:], rows, rtol=0, atol=0)
    trainer = _trainer(drafter, target, tmp_path / "run")
    trainer.train(False)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]
    drafter.save_pretrained(tmp_path / "ours")
    _check_drafts_exactly(DSparkAssistantModel.from_pretrained(tmp_path / "ours"), target)


@pytest.mark.parametrize("name", ["DeepSpec, Gemma", "speculators, reduced", "bare"])
def test_training_sees_the_head_that_decoding_uses(name: str, tmp_path: Path) -> None:
    """A drafter with a head of its own is trained through the target's, and drafts through another."""
    target = _target(vocab_size=VOCAB_SIZE)
    if name == "bare":
        target = tiny_target("gemma2", vocab_size=VOCAB_SIZE)
        drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, borrows_bare_weights=True)
    else:
        drafter = load_drafter(str(PACKAGINGS[name](tmp_path / "theirs")), dtype="float32")
    trainer = _trainer(drafter, target, tmp_path)
    states = 3 * torch.randn(5, drafter.config.hidden_size)
    with torch.no_grad():
        decoding = drafter.draft_head(trainer.target)(states)
    torch.testing.assert_close(trainer._draft_head.logits(states), decoding)
    # the lent head would have been another, and the loss goes through the drafter's
    assert not torch.allclose(trainer._head.logits(states), decoding, atol=0.1)
    loss = trainer.evaluate()["eval_loss_tv"]
    trainer._draft_head = trainer._head
    assert trainer.evaluate()["eval_loss_tv"] != loss


def test_an_open_choice_keeps_the_draft_vocabulary() -> None:
    """Adapting changes what a drafter may propose although nobody asked for it."""
    target = _target()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4, draft_token_ids=DRAFT_IDS)
    drafter.config.sts_temperatures = [1.5] * drafter.block_size
    drafter = adapt_drafter(drafter, target, _texts())
    assert drafter.draft_token_ids.tolist() == DRAFT_IDS
    # of a confidence that training moves
    assert drafter.config.sts_temperatures is None


KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "reduced": {"draft_token_ids": DRAFT_IDS},
    "Markov too": {"draft_token_ids": DRAFT_IDS, "markov_over_draft_vocab": True},
    "own": {"draft_token_ids": DRAFT_IDS, "owns_embeddings": True},
    "no Markov head": {"draft_token_ids": DRAFT_IDS, "markov_rank": 0},
}


@pytest.mark.parametrize(
    ("is_whole", "kind"),
    [
        (pytest.param if is_whole == (kind in ("own", "Markov too")) else slow)(is_whole, kind)
        for is_whole in (False, True)
        for kind in KINDS
    ],
)
def test_another_draft_vocabulary_keeps_what_was_learnt(is_whole: bool, kind: str) -> None:
    """For another language a drafter forgets the tokens that both share, or says other ones than it means."""
    target = _target()
    options: dict[str, Any] = {"num_hidden_layers": 1, "markov_rank": 4, "initializer_range": 0.3, **KINDS[kind]}
    drafter = DSparkAssistantModel.from_target(target, **options)
    adapter = TargetAdapter(target, drafter.target_layer_ids)
    chosen = torch.arange(VOCAB_SIZE) if is_whole else torch.tensor([3, 5, 8, 12, 40])
    after = choose_vocabulary(drafter, None if is_whole else chosen, adapter)
    old_ids = torch.arange(VOCAB_SIZE) if drafter.draft_token_ids is None else drafter.draft_token_ids
    shared = [token for token in chosen.tolist() if token in old_ids.tolist()]
    assert len(shared) >= 3
    states = torch.randn(6, drafter.config.hidden_size)

    def logits(one: DSparkAssistantModel, ids: Tensor) -> Tensor:
        # by token, whatever places the tokens have; read are tokens of both, of the later one alone and of neither
        found = one.draft_head(adapter)(states)
        if one.markov_head is not None:
            found = found + one.markov_head.project(one.markov_head.embed(torch.tensor([3, 5, 8, 40, 12, 20])))
        return found[:, [ids.tolist().index(token) for token in shared]]

    with torch.no_grad():
        torch.testing.assert_close(logits(after, chosen), logits(drafter, old_ids))
    assert after.config.draft_vocab_size == (None if is_whole else 5)
    _check_drafts_exactly(after, target)


def test_the_text_chooses_the_draft_vocabulary() -> None:
    """A drafter for another language can propose the old one's tokens alone."""
    target = _target()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4, draft_token_ids=DRAFT_IDS)
    text = Conversation(torch.tensor([1, 20, 21, 22, 20, 21, 22, 47]), torch.arange(8) > 0)
    # one of seven
    assert proposable_share(drafter, [text]) == pytest.approx(1 / 7)
    chosen = adapt_drafter(drafter, target, [text], draft_vocab=4)
    assert chosen.draft_token_ids.tolist() == [20, 21, 22, 47]
    assert proposable_share(chosen, [text]) == 1
    assert adapt_drafter(drafter, target, [text], draft_vocab=0).draft_token_ids is None


def test_another_models_drafter_is_refused() -> None:
    """Hours go into a drafter that cannot read its target."""
    drafter = DSparkAssistantModel.from_target(_target(), num_hidden_layers=1, markov_rank=4)
    with pytest.raises(ValueError, match="`assistant_model` must have the target's `hidden_size` 64, got 32"):
        adapt_drafter(drafter, _target(hidden_size=64, vocab_size=GROWN), _texts())
    needed = DSparkAssistantModel.from_target(_target(), num_hidden_layers=1, markov_rank=4, draft_token_ids=DRAFT_IDS)
    with pytest.raises(ValueError, match="`new_num_tokens` must be more than"):
        adapt_drafter(needed, _target(vocab_size=40), _texts(40))


def test_a_run_goes_on_although_the_text_grew(tmp_path: Path) -> None:
    """More text chooses other tokens: labels of the second run are read by them, drafts by the first run's."""
    target = _target()

    def start(ids: list[int]) -> DSparkAssistantModel:
        torch.manual_seed(0)
        return DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4, draft_token_ids=ids)

    options = {"save_strategy": "steps", "save_steps": 2}
    _trainer(start(DRAFT_IDS), target, tmp_path, max_steps=2, **options).train()
    later = _trainer(start([4, 6, 8, 10, 13, 31, 46]), target, tmp_path, max_steps=3, **options)
    later.train()
    drafter = later.model
    assert drafter.draft_token_ids.tolist() == DRAFT_IDS
    assert later._draft_ids.ge(0).nonzero().flatten().tolist() == DRAFT_IDS
    head = target.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    torch.testing.assert_close(later._head.weight, head.weight[DRAFT_IDS])
