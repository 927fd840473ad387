"""Passes below autograd: the same numbers, in our calls alone, and ordinary tensors that can be trained on later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dspark_hf import DSparkAssistantModel, LookupAssistant, generate_stream
from dspark_hf.generation import lean_passes as module
from dspark_hf.generation.lean_passes import below_autograd, lean_passes
from dspark_hf.generation.requests.request import Request
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target

pytestmark = pytest.mark.skipif(module._BELOW is None, reason="this PyTorch cannot leave autograd out")

PROMPT = torch.tensor([[5, 7, 9, 5, 7]])


def _is_below() -> bool:
    return torch._C._dispatch_tls_is_dispatch_key_excluded("ADInplaceOrView")


@pytest.fixture
def products(monkeypatch) -> list[tuple[torch.Tensor, bool]]:
    """The weights of products as they are made, and whether below autograd."""
    seen: list[tuple[torch.Tensor, bool]] = []
    linear = nn.functional.linear

    def watch(states, weight, *args):
        seen.append((weight, _is_below()))
        return linear(states, weight, *args)

    monkeypatch.setattr(nn.functional, "linear", watch)
    return seen


def _are_below(model: nn.Module, products: list[tuple[torch.Tensor, bool]]) -> set[bool]:
    weights = set(map(id, model.parameters()))
    return {is_below for weight, is_below in products if id(weight) in weights}


def _generate(target: Any, drafter: Any, **options: Any) -> Any:
    return target.generate(PROMPT, max_new_tokens=12, do_sample=False, assistant_model=drafter, **options)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "gpt2", "lfm2"])
def test_passes_give_the_same_numbers(family):
    """An operator means something else below autograd."""
    target = tiny_target(family)
    with torch.no_grad(), lean_passes():
        plain = target(PROMPT, output_hidden_states=True)
        with below_autograd(target):
            assert _is_below()
            below = target(PROMPT, output_hidden_states=True)
    assert torch.equal(below.logits, plain.logits)
    for mine, theirs in zip(below.hidden_states, plain.hidden_states, strict=True):
        assert torch.equal(mine, theirs) and not mine.is_inference() and not mine.requires_grad


@pytest.mark.parametrize("num_rows", [1, 2])
def test_passes_of_a_call_run_so_and_no_others(products, num_rows):
    """Target or drafter take the long way, or plain `generate` and training do not."""
    target = tiny_target("qwen3")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**ragged_prompts(num_rows), **options)
    products.clear()
    found = target.generate(**ragged_prompts(num_rows), assistant_model=drafter, **options)
    assert torch.equal(found, plain)
    assert _are_below(target, products) == _are_below(drafter.layers, products) == {True}
    products.clear()
    target.generate(**ragged_prompts(num_rows), **options)
    assert _are_below(target, products) == {False}


def test_streams_run_so_too(products):
    """A stream's passes take the long way, or leave the caller's code without gradients between them."""
    target = tiny_target("qwen3")
    requests = [Request(PROMPT[0], options={"max_new_tokens": 8, "do_sample": False})]
    for _ in generate_stream(target, requests, drafter=LookupAssistant()):
        assert not _is_below()
    assert _are_below(target, products) == {True}


def test_what_the_caller_does_in_a_call_has_gradients():
    """A processor that differentiates, or trains, gets no gradient."""

    class Differentiates(LogitsProcessor):
        def __call__(self, input_ids, scores):
            with torch.enable_grad():
                weight = torch.ones(scores.shape[-1], requires_grad=True)
                (scores * weight).sum().backward()
            assert weight.grad is not None
            return scores

    target = tiny_target("qwen3")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    plain = _generate(target, None)
    found = _generate(target, drafter, logits_processor=LogitsProcessorList([Differentiates()]))
    assert torch.equal(found, plain)


def test_what_a_call_returns_can_be_trained_on():
    """States that a call returns are refused by autograd, as those of inference mode are."""
    target = tiny_target("qwen3")
    output = _generate(target, LookupAssistant(), return_dict_in_generate=True, output_logits=True)
    cache = output.past_key_values
    cache.layers[0].keys.add_(0)
    target(output.sequences[:, -1:], past_key_values=cache).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in target.model.layers[0].mlp.parameters())
    weight = torch.ones(1, requires_grad=True)
    (output.logits[0] * weight).sum().backward()
    assert weight.grad is not None


def _differentiate(*args: Any) -> Any:
    with torch.enable_grad():
        point = torch.zeros(1, requires_grad=True)
        (point + 1).square().sum().backward()
    assert point.grad is not None


class Differentiating(Qwen3ForCausalLM):
    """A model of somebody's whose passes need gradients."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _differentiate()
        return super().__call__(*args, **kwargs)


class _Part(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        _differentiate()
        return self.inner(states)


def _own_class(target: Any) -> Any:
    mine = Differentiating(target.config).eval()
    mine.load_state_dict(target.state_dict())
    mine.generation_config = target.generation_config
    return mine


def _own_part(target: Any) -> None:
    target.model.layers[0].mlp = _Part(target.model.layers[0].mlp)


def _own_forward(target: Any) -> None:
    inner = target.model.layers[0].mlp
    inner.forward = _wrapped(inner.forward)


def _wrapped(forward: Any) -> Any:
    def mine(*args: Any, **kwargs: Any) -> Any:
        _differentiate()
        return forward(*args, **kwargs)

    return mine


def _own_attention(target: Any) -> None:
    AttentionInterface.register("mine", _wrapped(sdpa_attention_forward))
    AttentionMaskInterface.register("mine", sdpa_mask)
    target.set_attn_implementation("mine")


DOORS: dict[str, Any] = {
    "class": _own_class,
    "part": _own_part,
    "forward pass": _own_forward,
    "attention": _own_attention,
    "hook of a layer": lambda target: target.model.layers[1].register_forward_hook(_differentiate) and None,
    "hook of the head": lambda target: target.lm_head.register_forward_hook(_differentiate) and None,
    "hook of the embedding": lambda target: target.model.embed_tokens.register_forward_hook(_differentiate) and None,
}


@pytest.mark.parametrize("draft_token_ids", [None, [3, 4, 9, 17, 30, 31, 62]])
@pytest.mark.parametrize("door", DOORS)
def test_code_of_others_has_gradients(door, draft_token_ids):
    """What differentiates in a pass, a drafter's pass over the target's own parts included, gets no gradient."""
    target = tiny_target("qwen3")
    plain = _generate(target, None)
    target = DOORS[door](target) or target
    for options in ({"num_hidden_layers": 1, "markov_rank": 4, "draft_token_ids": draft_token_ids}, None):
        drafter = DSparkAssistantModel.from_target(target, **options) if options else LookupAssistant()
        assert torch.equal(_generate(target, drafter), plain)


def test_hooks_of_all_modules_have_gradients():
    """A hook of every module of the process gets no gradient."""
    target = tiny_target("qwen3")
    plain = _generate(target, None)
    handle = nn.modules.module.register_module_forward_hook(_differentiate)
    try:
        assert torch.equal(_generate(target, LookupAssistant()), plain)
    finally:
        handle.remove()


def test_masks_that_others_write_to_are_read_anew():
    """A mask changes from layer to layer and is taken for what it was: another text."""

    def narrowed(forward: Any) -> Any:
        def mine(*args: Any, attention_mask: Any, **kwargs: Any) -> Any:
            attention_mask[..., 1:4] = False
            return forward(*args, attention_mask=attention_mask, **kwargs)

        return mine

    target = tiny_target("qwen3", num_hidden_layers=3, initializer_range=1.0)
    layers = target.model.layers[1:]
    for layer in layers:
        layer.self_attn.forward = narrowed(layer.self_attn.forward)
    ids = torch.randint(2, 60, (1, 7))
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    with torch.no_grad():
        plain = target(ids, attention_mask=mask.clone()).logits
        with lean_passes(), below_autograd(target):
            found = target(ids, attention_mask=mask.clone()).logits
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


class _KnowsFew(torch.Tensor):
    """A weight that knows the operators that `nn.Linear` consists of, and no others."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.t.default, torch.ops.aten.detach.default):
            return _KnowsFew(func(args[0].inner))
        assert func is torch.ops.aten.mm.default, func
        return func(args[0], args[1].inner)


def test_weights_with_operators_of_their_own_take_the_usual_way():
    """A weight is asked for an operator that it does not know, since nothing divides it into those that it does."""
    target = tiny_target("llama")
    plain = _generate(target, None)
    for layer in target.model.layers:
        weight = _KnowsFew(layer.mlp.up_proj.weight.data)
        layer.mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
    assert torch.equal(_generate(target, LookupAssistant()), plain)


def test_calls_of_other_threads_may_end_meanwhile(monkeypatch):
    """A call that begins fails since another call of the same target takes its hooks off."""
    target = tiny_target("qwen3")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    # of the same layers
    other = TargetAdapter(target, drafter.target_layer_ids)
    is_known, opened = module._is_known, [other.__enter__()]

    def known_later(code):
        if opened and "TargetAdapter" in getattr(code, "__qualname__", ""):
            opened.pop().__exit__(None, None, None)
        return is_known(code)

    monkeypatch.setattr(module, "_is_known", known_later)
    _generate(target, drafter)
    assert not opened


def test_passes_that_may_need_gradients_take_the_usual_way():
    """Whoever trains, or casts weights for both, in the thread of a call loses gradients."""
    target = tiny_target("qwen3")
    with torch.no_grad(), below_autograd(target):
        assert not _is_below()
    with lean_passes():
        with below_autograd(target):
            assert not _is_below()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), below_autograd(target):
            assert not _is_below()


class _Names(TorchDispatchMode):
    """The operators that a pass consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_whoever_counts_operators_sees_the_usual_ones():
    """A count of products misses those of the passes, which reach it as something else."""
    target = tiny_target("qwen3")
    with torch.no_grad(), lean_passes():
        with _Names() as plain:
            target(PROMPT)
        with _Names() as found, below_autograd(target):
            target(PROMPT)
    assert found.seen == plain.seen
