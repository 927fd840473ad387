"""DeepSeek-V4 in training: what its extra losses are, where gradients go, and checkpointed layers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_hf import DeepseekV4DSparkForCausalLM, DSparkAssistantModel
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.deepseek_v4 import attention
from dspark_hf.modeling.deepseek_v4.losses import balance_loss
from tests.closeness import assert_same_up_to_rounding
from tests.modeling.deepseek_v4.tiny import VOCAB, tiny_model
from tests.thinning import slow

INDEXER = ".attn.indexer."
ROUNDED = {"cache_dtype": "fp8", "indexer_dtype": "fp4"}


def _text(num_rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(1, VOCAB, (num_rows, length), generator=torch.Generator().manual_seed(3))


def _gradients(model: torch.nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _has_gradient(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.abs().sum() > 0)


def _train_step(model: DeepseekV4DSparkForCausalLM, token_ids: Tensor, **options: Any) -> Tensor:
    loss = model.train()(token_ids, labels=token_ids, **options).loss
    loss.backward()
    return loss.detach()


def _enable_checkpointing(model: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        # transformers 5.24 renames it; 5.17 has the old name only
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(**options)


def _assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = _gradients(theirs)
    assert any(_has_gradient(gradient) for gradient in expected.values())
    for name, gradient in _gradients(ours).items():
        assert (gradient is None) == (expected[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


# every expert is chosen by some token of these texts
@pytest.mark.parametrize(("coefficient", "indexer_dtype"), [(0.0, None), slow(0.1, None), (0.1, "fp4")])
def test_gradients_reach_every_parameter_that_is_trained(coefficient: float, indexer_dtype: str | None) -> None:
    """A part of the model would keep its random weights, or the indexer would be trained although nobody asked."""
    fields = {"output_router_logits": True, "indexer_loss_coef": coefficient, "indexer_dtype": indexer_dtype}
    model = tiny_model(1, **fields)
    tables = {name: table.clone() for name, table in model.named_parameters() if "tid2eid" in name}
    _train_step(model, _text(4))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in dict(model.named_parameters()) if name not in trained} == {
        *tables,
        *(f"model.layers.{layer}.ffn.gate.bias" for layer in (2, 3, 4)),
    }
    without = {name for name, gradient in _gradients(model).items() if not _has_gradient(gradient)}
    indexers = {name for name in trained if INDEXER in name}
    assert len(indexers) == 12
    assert without & trained == (set() if coefficient else indexers)
    assert all(torch.equal(table, model.get_parameter(name)) for name, table in tables.items())


@pytest.mark.parametrize(
    ("is_training", "fields"),
    [
        pytest.param(True, {}, id="training", marks=pytest.mark.slow),
        pytest.param(False, ROUNDED, id="evaluating, rounded", marks=pytest.mark.slow),
        pytest.param(False, {}, id="evaluating", marks=pytest.mark.slow),
        pytest.param(True, ROUNDED, id="training, rounded"),
    ],
)
def test_gradients_do_not_depend_on_the_cache(is_training: bool, fields: dict[str, Any]) -> None:
    """The compressors learn nothing, and the embedding something else, where a cache is kept: as after loading."""
    models = [tiny_model(1, indexer_loss_coef=0.1, **fields).train(is_training) for _ in range(2)]
    # padding on the left: rows complete different numbers of entries
    token_ids = _text(3, 40)
    mask = torch.ones_like(token_ids)
    mask[1, :7] = mask[2, :21] = 0
    labels = token_ids.masked_fill(mask == 0, -100)
    for model, use_cache in zip(models, (True, False), strict=True):
        outputs = model(token_ids, attention_mask=mask, labels=labels, use_cache=use_cache)
        assert (outputs.get(CACHE_KEY) is not None) == use_cache
        outputs.loss.backward()
    _assert_same_gradients(*models)


def test_a_pass_over_a_cache_has_the_gradients_of_its_own_tokens() -> None:
    """A pass behind a prompt in the cache gives its tokens other gradients than a pass over the whole text."""
    model = tiny_model(2)
    token_ids, num_before = _text(2, 45), 21
    embedded = model.get_input_embeddings()(token_ids).detach()
    gradients = []
    for is_cached in (True, False):
        # what comes later has no part in what came before, so these gradients are the same
        later = embedded[:, num_before:].clone().requires_grad_()
        if is_cached:
            with torch.no_grad():
                cache = model(token_ids[:, :num_before], use_cache=True)[CACHE_KEY]
            logits = model(token_ids[:, num_before:], inputs_embeds=later, **{CACHE_KEY: cache}).logits
        else:
            inputs = torch.cat([embedded[:, :num_before], later], dim=1)
            logits = model(token_ids, inputs_embeds=inputs, use_cache=False).logits[:, num_before:]
        logits.square().mean().backward()
        assert later.grad is not None
        gradients.append(later.grad)
    assert_same_up_to_rounding(*gradients)


def test_the_indexers_loss_trains_the_indexer_alone() -> None:
    """The model would learn to be easy to index rather than to predict text."""
    model = tiny_model(2, indexer_loss_coef=1.0).train()
    model(_text()).indexer_loss.backward()
    reached = {name for name, gradient in _gradients(model).items() if gradient is not None}
    assert reached == {name for name in _gradients(model) if INDEXER in name}


def test_the_indexers_loss_is_its_divergence_from_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The indexer would be trained towards something else than what the attention reads."""
    seen = []
    original = attention._index_loss

    def record(weights: Tensor, scores: Tensor, is_visible: Tensor) -> Tensor:
        seen.append((weights.detach(), scores.detach(), is_visible))
        return original(weights, scores, is_visible)

    monkeypatch.setattr(attention, "_index_loss", record)
    model = tiny_model(3, indexer_loss_coef=1.0).train()
    loss = model(_text(1)).indexer_loss
    total = 0.0
    for weights, scores, is_visible in seen:
        for query in range(weights.shape[1]):
            chosen = is_visible[0, query].nonzero().flatten()
            if len(chosen):
                wanted = weights[0, query].sum(0)[chosen].double()
                wanted = wanted / wanted.sum()
                believed = scores[0, query, chosen].double().softmax(-1)
                total += float((wanted * (wanted / believed).log()).sum())
    # a mean over tokens, a sum over the layers
    assert loss.item() == pytest.approx(total / 40, rel=1e-4)
    assert loss.item() > 0.01


def test_the_balance_loss_counts_by_hand() -> None:
    """Experts would be pressed into an uneven use, or padding would count."""
    torch.manual_seed(0)
    affinities = [torch.rand(6, 4) for _ in range(2)]
    is_real = torch.tensor([True, True, False, True, True, False])
    expected = 0.0
    for affinity in affinities:
        rows = [row for row, real in zip(affinity.tolist(), is_real.tolist(), strict=True) if real]
        for expert in range(4):
            uses = sum(expert in sorted(range(4), key=lambda x: -row[x])[:2] for row in rows) / (2 * len(rows))
            share = sum(row[expert] / sum(row) for row in rows) / len(rows)
            expected += 4 * uses * share / len(affinities)
    assert balance_loss(affinities, 2, is_real).item() == pytest.approx(expected, rel=1e-5)
    even = torch.ones(4, 4) + torch.eye(4) + torch.eye(4).roll(1, 0)
    assert balance_loss([even], 2, None).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="`output_router_logits` must be False"):
        balance_loss([], 2, None)


@pytest.mark.parametrize("is_left", [False, True])
def test_padding_changes_no_loss(is_left: bool) -> None:
    """A text's loss would depend on how long the other texts of its batch are."""
    model = tiny_model(4, output_router_logits=True, indexer_loss_coef=1.0).train()
    token_ids = _text(1, 30)
    alone = model(token_ids, labels=token_ids)
    pads = (9, 0) if is_left else (0, 9)
    padded = torch.nn.functional.pad(token_ids, pads, value=7)
    mask = torch.nn.functional.pad(torch.ones_like(token_ids), pads)
    labels = padded.masked_fill(mask == 0, -100)
    # a text's first token follows nothing
    labels[:, pads[0]] = -100
    together = model(padded, attention_mask=mask, labels=labels)
    for name in ("loss", "aux_loss", "indexer_loss"):
        torch.testing.assert_close(together[name], alone[name], atol=1e-5, rtol=1e-4)


def test_accumulated_batches_weigh_like_one() -> None:
    """Extra losses would weigh more the more batches are accumulated."""
    model = tiny_model(5, output_router_logits=True, router_aux_loss_coef=10.0, indexer_loss_coef=10.0)
    token_ids = _text(1)
    whole = model.train()(token_ids, labels=token_ids)
    others = 10 * (whole.aux_loss + whole.indexer_loss)
    half = model(token_ids, labels=token_ids, num_items_in_batch=torch.tensor(2 * token_ids.numel())).loss
    # Transformers counts a text's first token, which has no loss
    torch.testing.assert_close(2 * half, (whole.loss - others) * 39 / 40 + others, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, slow(True)])
def test_checkpointing_the_target_changes_nothing_but_memory(use_reentrant: bool) -> None:
    """`gradient_checkpointing_enable` would fail, be ignored, or change losses and gradients."""
    fields = {"output_router_logits": True, "indexer_loss_coef": 0.5}
    plain, checkpointed = tiny_model(6, **fields), tiny_model(6, **fields)
    _enable_checkpointing(checkpointed, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = [0] * 5
    for number, layer in enumerate(checkpointed.model.layers):
        layer.attn.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 29:] = 0
    losses = [_train_step(model, _text(), attention_mask=mask) for model in (plain, checkpointed)]
    assert_same_up_to_rounding(losses[1], losses[0])
    # once forward, once more on the way back
    assert calls == [2] * 5
    _assert_same_gradients(checkpointed, plain)


def test_checkpointed_training_refuses_a_cache() -> None:
    """What the cache holds would be left out of the text in silence."""
    model = tiny_model(7)
    cache = model(_text())[CACHE_KEY]
    _enable_checkpointing(model)
    with pytest.raises(ValueError, match="must be left out of training with gradient checkpointing"):
        model.train()(_text(), **{CACHE_KEY: cache})
    assert model(_text()).get(CACHE_KEY) is None
    assert model.eval()(_text(), **{CACHE_KEY: cache}).logits.isfinite().all()


def test_checkpointing_the_drafter_changes_nothing_but_memory() -> None:
    """`gradient_checkpointing_enable` would fail, be ignored, or change the drafter's gradients."""
    target = tiny_model(8)
    drafters = []
    for _ in range(2):
        torch.manual_seed(9)
        drafters.append(DSparkAssistantModel.from_target(target, markov_rank=8, block_size=4).train())
    plain, checkpointed = drafters
    _enable_checkpointing(checkpointed)
    calls = [0] * 3
    for number, layer in enumerate(checkpointed.layers):
        layer.attn.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    token_ids, anchors = _text(), torch.tensor([[3, 20], [7, 31]])
    context = torch.randn(2, 40, 3 * 64)
    previous = token_ids.gather(1, (anchors[..., None] + torch.arange(4)).flatten(1)).view(2, 2, 4)
    totals = []
    for drafter in drafters:
        output = drafter(context, token_ids.gather(1, anchors), anchors, previous, TargetAdapter(target))
        bias = drafter.markov_head.project(output.latents)
        total = output.hidden_states.pow(3).sum() + bias.square().sum() + output.confidence_logits.sum()
        total.backward()
        totals.append(total.detach())
    assert_same_up_to_rounding(totals[1], totals[0])
    assert calls == [2] * 3
    _assert_same_gradients(checkpointed, plain)
    trained = {name: _has_gradient(x.grad) for name, x in plain.named_parameters() if x.requires_grad}
    assert {name for name, has in trained.items() if not has and ".experts." not in name} == set()
