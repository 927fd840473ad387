"""Drafters that propose only the tokens a target writes often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.modeling.drafting import draft_greedily
from tests.tiny import tiny_target

DRAFT_IDS = [3, 4, 9, 17, 30, 31, 62]


def _pair(family: str = "llama", **options: Any) -> tuple[DSparkAssistantModel, TargetAdapter]:
    target = tiny_target(family)
    drafter = DSparkAssistantModel.from_target(
        target,
        num_hidden_layers=1,
        block_size=4,
        markov_rank=6,
        initializer_range=0.3,
        draft_token_ids=DRAFT_IDS,
        **options,
    )
    return drafter, TargetAdapter(target, drafter.target_layer_ids)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_logits_are_those_of_the_full_drafter(family: str) -> None:
    """A draft id would stand for another token, or the target's soft cap would be left out."""
    drafter, target = _pair(family)
    whole = DSparkAssistantModel.from_target(
        target.model, num_hidden_layers=1, block_size=4, markov_rank=6, initializer_range=0.3
    )
    weights = {name: x for name, x in drafter.state_dict().items() if name not in ("d2t", "t2d")}
    transition = torch.zeros(64, 6)
    transition[DRAFT_IDS] = weights["markov_head.markov_w2.weight"]
    whole.load_state_dict({**weights, "markov_head.markov_w2.weight": transition})

    context = torch.randn(1, 5, 32 * len(drafter.target_layer_ids))
    reduced = draft_greedily(drafter, target, context, [5], [8])
    assert set(reduced.token_ids.flatten().tolist()) <= set(DRAFT_IDS)
    outside = torch.ones(64, dtype=torch.bool)
    outside[DRAFT_IDS] = False
    assert (reduced.logits[..., outside] == float("-inf")).all()
    # slot 0 stands for itself: later slots follow other drafts
    full = draft_greedily(whole, target, context, [5], [8])
    torch.testing.assert_close(reduced.logits[:, 0, DRAFT_IDS], full.logits[:, 0, DRAFT_IDS], atol=1e-5, rtol=0)


def test_quantised_head_is_called_as_a_module() -> None:
    """A head without plain weight rows would be read wrongly, or not at all."""
    drafter, target = _pair()
    context = torch.randn(1, 5, 32 * len(drafter.target_layer_ids))
    plain = draft_greedily(drafter, target, context, [5], [8])

    class Wrapped(torch.nn.Linear):
        """Stands for a quantised layer: not exactly `nn.Linear`, so its weight is nobody's business."""

    head = target.model.lm_head
    wrapped = Wrapped(32, 64, bias=False)
    wrapped.weight = head.weight
    target.model.lm_head = wrapped
    assert drafter.draft_head(target).rows is None
    called = draft_greedily(drafter, target, context, [5], [8])
    torch.testing.assert_close(called.logits, plain.logits, atol=1e-5, rtol=0)


def test_round_trip(tmp_path: Path) -> None:
    """A saved drafter would forget which tokens its ids stand for."""
    drafter, _ = _pair()
    drafter.to(torch.bfloat16).save_pretrained(tmp_path)
    again, info = DSparkAssistantModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.draft_token_ids.tolist() == DRAFT_IDS
    assert torch.nonzero(again.t2d).flatten().tolist() == DRAFT_IDS
    # the names and the meaning that other servers read: draft id + d2t[draft id] = token
    assert again.d2t.tolist() == [token - draft for draft, token in enumerate(DRAFT_IDS)]


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_a_reduced_markov_head_knows_the_proposable_tokens(head: str, tmp_path: Path) -> None:
    """A proposable token would take another one's row, or a token that is none would crash or take any row."""
    drafter, _ = _pair(markov_over_draft_vocab=True, markov_head_type=head)
    assert drafter.markov_head.markov_w1.weight.shape == (len(DRAFT_IDS) + 1, 6)
    ids = torch.arange(64).view(4, 16)
    rows = [DRAFT_IDS.index(token) if token in DRAFT_IDS else len(DRAFT_IDS) for token in range(64)]
    expected = drafter.markov_head.markov_w1.weight[rows].view(4, 16, 6)
    assert torch.equal(drafter.markov_head.embed(ids), expected)
    drafter.save_pretrained(tmp_path)
    again = DSparkAssistantModel.from_pretrained(tmp_path)
    assert torch.equal(again.markov_head.embed(ids), expected)


def test_a_reduced_markov_head_drafts_for_any_anchor() -> None:
    """Text with a token outside the draft vocabulary would stop generation, or change its output."""
    drafter, target = _pair(markov_over_draft_vocab=True)
    prompt = torch.tensor([[5, 9, 63]])
    plain = target.model.generate(prompt, max_new_tokens=12, do_sample=False)
    assisted = target.model.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=drafter)
    assert torch.equal(plain, assisted)


def test_order_does_not_matter() -> None:
    """Ids given in another order would not match the rows of the head."""
    target = tiny_target()
    drafter = DSparkAssistantModel.from_target(
        target, num_hidden_layers=1, markov_rank=4, draft_token_ids=DRAFT_IDS[::-1]
    )
    assert drafter.draft_token_ids.tolist() == DRAFT_IDS


@pytest.mark.parametrize("ids", [[1, 1, 2], [1, 64], [-1, 2]])
def test_wrong_ids_are_refused(ids: list[int]) -> None:
    """Duplicate or unknown tokens would corrupt the map."""
    with pytest.raises(ValueError, match=r"`draft_token_ids` must be . different ids in \[0, 63\]"):
        DSparkAssistantModel.from_target(tiny_target(), num_hidden_layers=1, markov_rank=4, draft_token_ids=ids)


_LONG = torch.tensor(DRAFT_IDS) - torch.arange(len(DRAFT_IDS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d2t": _LONG + 40}, r"`d2t` must name tokens in \[0, 63\], got ids from 43 to 102"),
        ({"d2t": _LONG - 9}, r"`d2t` must name tokens in \[0, 63\], got ids from -6"),
        ({"d2t": -torch.arange(len(DRAFT_IDS))}, "`d2t` must name 7 different tokens, got 1"),
        ({"t2d": torch.arange(64) < 7}, "`t2d` must mark the 7 tokens that `d2t` names"),
        ({"t2d": torch.zeros(64, dtype=torch.bool)}, "`t2d` must mark the 7 tokens that `d2t` names"),
        ({"markov_head.known_ids": torch.arange(7)}, "`known_ids` must hold the tokens that `d2t` names"),
    ],
)
def test_a_damaged_map_is_refused_when_loading(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A wrong map would load, and stop generation in the middle or draft tokens that nobody meant."""
    drafter, _ = _pair(markov_over_draft_vocab=True)
    drafter.save_pretrained(tmp_path)
    DSparkAssistantModel.from_pretrained(tmp_path)
    weights = {**load_file(tmp_path / "model.safetensors"), **changes}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        DSparkAssistantModel.from_pretrained(tmp_path)


def test_all_tokens_have_no_map() -> None:
    """A drafter of the whole vocabulary would pay for a map it does not need."""
    drafter = DSparkAssistantModel.from_target(tiny_target(), num_hidden_layers=1, markov_rank=4)
    assert drafter.draft_token_ids is None


def test_the_tokens_are_named_when_a_drafter_is_made() -> None:
    """A number without tokens, or tokens too late, end in errors of Python's own."""
    target = tiny_target()
    with pytest.raises(ValueError, match=r"`draft_vocab_size` must be left out, .* Pass the tokens themselves"):
        DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=0, draft_vocab_size=7)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=0, draft_vocab_size=None)
    with pytest.raises(ValueError, match="`draft_token_ids` must be chosen when a drafter is made, got 7"):
        drafter.set_draft_token_ids(torch.tensor(DRAFT_IDS))
