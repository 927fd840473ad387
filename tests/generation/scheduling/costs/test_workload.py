"""Steps that are run for their time alone: the steps of `generate`, and no trace of them afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.compat import CACHE_KEY, empty_cache_like
from dspark_hf.generation.scheduling.costs.workload import StepTimer, disagree, measure, timed
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.cropped import SingleRowTarget
from dspark_hf.generation.targets.ragged import RaggedTarget
from tests.generation.drafters import ScriptedDrafter
from tests.modeling.deepseek_v4.tiny import tiny_model
from tests.thinning import slow
from tests.tiny import FAMILIES, VOCAB_SIZE, tiny_target

CONTEXT = 21
WIDTH = 4


def _drafter(target: PreTrainedModel, **fields: Any) -> DSparkAssistantModel:
    options = {"num_hidden_layers": 1, "markov_rank": 8, "block_size": 5}
    return DSparkAssistantModel.from_target(target, **{**options, **fields})


@contextmanager
def _attention_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Give the shapes of queries, keys and masks of all attention."""
    calls: list[tuple[Any, ...]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, **kwargs):
        calls.append((query.shape, key.shape, value.shape, None if attn_mask is None else attn_mask.shape))
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        yield calls


def _read_target(adapter: TargetAdapter, num_rows: int) -> Any:
    """Return the target that `generate` would use, after it has really read a prompt."""
    kwargs = {CACHE_KEY: empty_cache_like(adapter.model)}
    prompts = torch.randint(2, VOCAB_SIZE, (num_rows, CONTEXT))
    target: Any = (
        SingleRowTarget(adapter, prompts, GenerationConfig(), kwargs)
        if num_rows == 1
        else RaggedTarget(adapter, prompts, GenerationConfig(), kwargs, widest=WIDTH)
    )
    target.prefill()
    return target


@pytest.mark.parametrize(
    ("family", "num_rows"),
    [
        (pytest.param if case in (("llama", 1), ("gemma3_text", 3), ("gemma4_text", 1), ("gpt2", 3)) else slow)(*case)
        for case in product(FAMILIES, (1, 3))
        # it caps its attention scores, which SDPA cannot
        if case[0] != "gemma2"
    ],
)
def test_a_pretended_context_costs_what_a_real_one_does(family, num_rows, monkeypatch):
    """Attention of a measured pass runs over other sizes than in `generate`."""
    target = tiny_target(family, attn_implementation="sdpa")
    with torch.no_grad(), TargetAdapter(target, [0]) as adapter:
        workload = StepTimer(adapter, None)
        with _attention_calls(monkeypatch) as pretended:
            workload.verify_seconds(num_rows, CONTEXT, WIDTH)
        real_target = _read_target(adapter, num_rows)
        with _attention_calls(monkeypatch) as real:
            real_target.verify(torch.ones(num_rows, WIDTH, dtype=torch.long))
        # without the pass that only made a cache
        assert pretended[-len(real) :] == real
        assert real
        # a second pass meets the same context
        with _attention_calls(monkeypatch) as again:
            workload.verify_seconds(num_rows, CONTEXT, WIDTH)
        assert again == real


def test_a_cache_of_another_kind_is_really_filled():
    """DeepSeek-V4 is measured on an empty context, or on one that grows."""
    target = tiny_model()
    with TargetAdapter(target, [0]) as adapter:
        workload = StepTimer(adapter, _drafter(target))
        for num_rows in (1, 3):
            for width in (1, 6, 2):
                workload.verify_seconds(num_rows, 70, width)
                assert workload._target.cache.lengths == [70] * num_rows
        with pytest.raises(ValueError, match="`max_rollback` must be at least"):
            workload.verify_seconds(1, 70, target.config.max_rollback + 1)


@pytest.mark.parametrize("window", [None, 8])
def test_the_drafters_context_keeps_its_length(window):
    """Drafts are measured on ever longer contexts, or on none."""
    target = tiny_target()
    drafter = _drafter(target, context_window=window)
    with TargetAdapter(target, drafter.target_layer_ids) as adapter:
        workload = StepTimer(adapter, drafter)
        lengths = []
        for num_drafts in (1, 5, 5, 3):
            workload.draft_seconds(2, 1500, num_drafts)
            lengths.append(list(workload._context.cache.lengths.host))
    assert lengths == [lengths[0]] * 4
    assert lengths[0] == [1500] * 2 or (window is not None and window <= lengths[0][0] <= 4 * window)


def test_tokens_and_states_differ():
    """A mixture of experts is measured with all tokens at the same expert."""
    target = tiny_target()
    drafter = _drafter(target)
    with TargetAdapter(target, drafter.target_layer_ids) as adapter:
        workload = StepTimer(adapter, drafter)
        tokens, states = workload._tokens(3, 6), workload._hidden_states(3, 6)
    assert len(tokens.unique()) == 18
    assert tokens.min() >= 0 and tokens.max() < VOCAB_SIZE // 2
    assert len(states.flatten(0, 1).unique(dim=0)) == 18


@pytest.mark.parametrize("is_training", [False, True])
def test_no_trace_is_left(is_training):
    """Measuring changes the target, its mode, its hooks, or what is sampled next."""
    target = tiny_target().train(is_training)
    drafter = _drafter(target)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    generator = torch.get_rng_state()
    with TargetAdapter(target, drafter.target_layer_ids) as adapter:
        workload = StepTimer(adapter, drafter)
        for num_rows in (1, 2):
            workload.verify_seconds(num_rows, 30, 3)
            workload.draft_seconds(num_rows, 30, 5)
        assert not adapter._captured
    assert torch.equal(torch.get_rng_state(), generator)
    assert target.training is is_training
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert not any(module._forward_hooks for module in target.modules())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_any_drafter_will_do():
    """A drafter that is no model of ours cannot be measured."""
    target = tiny_target()
    drafter = ScriptedDrafter(target, torch.ones(2, 8, dtype=torch.long), [0, 0], 1.0)
    with TargetAdapter(target, drafter.target_layer_ids) as adapter:
        assert StepTimer(adapter, drafter).draft_seconds(2, 30, 5) > 0


def test_the_first_turn_does_not_count():
    """Choosing kernels and finding memory is taken for the cost of a step."""
    runs: Counter[str] = Counter()

    def seconds_of(step: str) -> float:
        runs[step] += 1
        return 100.0 if runs[step] == 1 else {"a": 1.0, "b": 2.0}[step]

    advances = []
    assert measure(["a", "b"], seconds_of, repeats=4, advance=lambda: advances.append(None)) == {"a": 1.0, "b": 2.0}
    assert len(advances) == 10


def test_a_disturbance_does_not_count():
    """A slow moment of the machine makes a step dear."""
    samples = iter([0.0, 5.0, 1.1, 9.0, 1.0, 7.0])
    assert measure(["a"], lambda _: next(samples), repeats=5) == {"a": 1.1}
    assert measure(["a"], lambda _: 3.0, repeats=1) == {"a": 3.0}


def test_steps_take_turns():
    """A slow minute hits one step alone."""
    order: list[int] = []

    def seconds_of(step: int) -> float:
        order.append(step)
        return 0.0

    measure(range(3), seconds_of, repeats=2)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]


def test_timed_waits_before_and_after():
    """Work that still runs is counted, or work that was started is not."""
    calls: list[str] = []
    assert timed(lambda: calls.append("run"), lambda: calls.append("wait")) >= 0
    assert calls == ["wait", "run", "wait"]


def test_doubtful_times_are_measured_again():
    """Times from a busy moment are kept although the machine is quiet again; or measuring never ends."""
    samples = iter([0.0, 9.0, 9.0, 3.0, 0.0, 1.0, 1.0, 1.0])
    assert measure(["a"], lambda _: next(samples), repeats=3, is_doubtful=lambda times: disagree(times["a"])) == {
        "a": 1.0
    }
    assert list(samples) == []


def test_quiet_times_are_measured_once():
    """Every measurement takes three times as long."""
    samples = iter([0.0, 1.0, 1.2, 1.1])
    assert measure(["a"], lambda _: next(samples), repeats=3, is_doubtful=lambda times: disagree(times["a"])) == {
        "a": 1.0
    }
