"""Passes below autograd: the same numbers, in our calls alone, and ordinary tensors that can be trained on later."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList, Qwen3ForCausalLM

from dspark_hf import DSparkAssistantModel, LookupAssistant, generate_stream
from dspark_hf.generation import lean_passes as module
from dspark_hf.generation.lean_passes import below_autograd, lean_passes
from dspark_hf.generation.requests.request import Request
from tests.generation.prompts import ragged_prompts
from tests.tiny import tiny_target

pytestmark = pytest.mark.skipif(module._BELOW is None, reason="this PyTorch cannot leave autograd out")

PROMPT = torch.tensor([[5, 7, 9, 5, 7]])


def _is_below() -> bool:
    return torch._C._dispatch_tls_is_dispatch_key_excluded("ADInplaceOrView")


class _Watched:
    """Whether passes of models run below autograd."""

    def __init__(self, *models: Any):
        self.seen: list[bool] = []
        for model in models:
            layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
            # a hook would be somebody's that may need gradients
            layer.forward = functools.partial(self._forward, layer.forward)

    def _forward(self, forward: Any, states: torch.Tensor) -> torch.Tensor:
        self.seen.append(_is_below())
        return forward(states)


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
def test_passes_of_a_call_run_so_and_no_others(num_rows):
    """Target or drafter take the long way, or plain `generate` and training do not."""
    target = tiny_target("qwen3")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=4)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**ragged_prompts(num_rows), **options)
    watched = _Watched(target), _Watched(drafter)
    found = target.generate(**ragged_prompts(num_rows), assistant_model=drafter, **options)
    assert torch.equal(found, plain)
    assert all(all(one.seen) and one.seen for one in watched)
    for one in watched:
        one.seen.clear()
    target.generate(**ragged_prompts(num_rows), **options)
    assert not any(watched[0].seen)


def test_streams_run_so_too():
    """A stream's passes take the long way, or leave the caller's code without gradients between them."""
    target = tiny_target("qwen3")
    watched = _Watched(target)
    requests = [Request(PROMPT[0], options={"max_new_tokens": 8, "do_sample": False})]
    for _ in generate_stream(target, requests, drafter=LookupAssistant()):
        assert not _is_below()
    assert watched.seen and all(watched.seen)


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


class Differentiating(Qwen3ForCausalLM):
    """A model of somebody's whose passes need gradients."""


def _differentiate(*args: Any) -> Any:
    with torch.enable_grad():
        point = torch.zeros(1, requires_grad=True)
        (point + 1).square().sum().backward()
    assert point.grad is not None


def test_hooks_of_others_have_gradients():
    """A hook that differentiates, as for a score of what a layer gives, gets no gradient."""
    target = tiny_target("qwen3")
    plain = _generate(target, None)
    target.model.layers[1].register_forward_hook(_differentiate)
    assert torch.equal(_generate(target, LookupAssistant()), plain)


def test_models_of_others_take_the_usual_way():
    """A model that differentiates in its passes gets no gradient."""
    target = tiny_target("qwen3")
    mine = Differentiating(target.config).eval()
    mine.load_state_dict(target.state_dict())
    mine.generation_config = target.generation_config
    mine.register_forward_pre_hook(_differentiate)
    assert torch.equal(_generate(mine, LookupAssistant()), _generate(target, None))


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
