"""The target's states are its own, wherever they come from, and the cache stays as small as it was told to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel

from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.training.states import StateCache, StateSource, logsumexp
from tests.tiny import tiny_target


def _sequences(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(2, 60, (length,)) for length in lengths]


def _cache(folder: Path, target: PreTrainedModel, layers: list[int] | None = None, **options: Any) -> StateCache:
    adapter = TargetAdapter(target, layers or [0])
    return StateCache(folder, adapter, **{"dtype": torch.float32, "max_bytes": 10**9, **options})


@pytest.mark.parametrize("size", [4, 7, 64, 100])
def test_logsumexp_of_parts_of_a_vocabulary(size: int) -> None:
    """Probabilities would not sum to one."""
    logits = (torch.randn(5, 64) * 40).to(torch.bfloat16)
    logits[:, 20:40] = float("-inf")
    torch.testing.assert_close(logsumexp(logits, size), logits.double().logsumexp(-1).float(), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_states_are_those_of_the_target(family: str) -> None:
    """Drafters would learn from other layers, or from another distribution than the target's."""
    target = tiny_target(family)
    adapter = TargetAdapter(target, [0])
    sequences = _sequences(9, 30, 14)
    states = StateSource(adapter, dtype=torch.float32).get(sequences)
    for row, ids in enumerate(sequences):
        with torch.no_grad():
            output = target(ids[None], output_hidden_states=True)
        context, last, lse = (x[row, : len(ids)] for x in (states.context, states.last, states.lse))
        torch.testing.assert_close(context.float(), output.hidden_states[1][0], atol=0.02, rtol=0.01)
        probs = (adapter.head(last.float()) - lse[:, None]).exp()
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(ids)), atol=1e-5, rtol=0)
        torch.testing.assert_close(probs, output.logits[0].softmax(-1), atol=0.02, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_states_for_a_temperature_are_kept_apart(tmp_path: Path, temperature: float) -> None:
    """Probabilities at a temperature do not sum to one, or are those that a run at another one has kept."""
    target = tiny_target()
    adapter, sequences = TargetAdapter(target, [0]), _sequences(9, 20)
    usual = StateSource(adapter, dtype=torch.float32, cache=_cache(tmp_path, target)).get(sequences)
    cache = _cache(tmp_path, target, temperature=temperature)
    states = StateSource(adapter, dtype=torch.float32, cache=cache, temperature=temperature).get(sequences)
    assert torch.equal(states.last, usual.last)
    probs = (adapter.head(states.last[1].float()) / temperature - states.lse[1, :, None]).exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones(20), atol=1e-5, rtol=0)


def test_remembered_states_are_the_computed_ones(tmp_path: Path) -> None:
    """A second epoch would train on other states, or run the target again."""
    target = tiny_target()
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    target.get_decoder().register_forward_hook(count)
    sequences = _sequences(9, 20, 13)
    adapter = TargetAdapter(target, [0, 1])
    first = StateSource(adapter, dtype=torch.float32, cache=_cache(tmp_path, target, [0, 1])).get(sequences)
    assert runs == 1
    # another run of the same target finds them, in any order and company
    again = StateSource(adapter, dtype=torch.float32, cache=_cache(tmp_path, target, [0, 1]))
    for row in (2, 0, 1):
        states = again.get([sequences[row]])
        for name in ("context", "last", "lse"):
            assert torch.equal(getattr(states, name)[0], getattr(first, name)[row, : len(sequences[row])])
    assert runs == 1


def test_the_cache_keeps_to_its_size(tmp_path: Path) -> None:
    """The disk would fill up."""
    target = tiny_target()
    sequences = _sequences(*[16] * 6)
    one = 16 * (2 * 32 + 2 * 32 + 4)
    for _ in range(2):
        # a later run counts what the earlier one left
        source = StateSource(
            TargetAdapter(target, [0]), dtype=torch.float32, cache=_cache(tmp_path, target, max_bytes=4 * one)
        )
        source.get(sequences)
        files = list(tmp_path.rglob("*.safetensors"))
        assert 1 <= len(files) <= 4
    assert not list(tmp_path.rglob("*.partial"))


def test_states_of_another_target_are_not_found(tmp_path: Path) -> None:
    """A drafter would be trained on the states of another target, of other layers or of other arithmetic."""
    sequence = _sequences(9)[0]
    target = tiny_target()
    states = (torch.zeros(9, 32).bfloat16(), torch.zeros(9, 32).bfloat16(), torch.zeros(9))
    _cache(tmp_path, target).put(sequence, states)
    assert _cache(tmp_path, target).get(sequence) is not None
    assert _cache(tmp_path, target, [1]).get(sequence) is None
    assert _cache(tmp_path, target, dtype=torch.bfloat16).get(sequence) is None
    with torch.no_grad():
        target.lm_head.weight.add_(0.01)
    assert _cache(tmp_path, target).get(sequence) is None
    assert _cache(tmp_path, tiny_target("qwen3")).get(sequence) is None


def _nan(path: Path) -> None:
    tensors = load_file(path)
    tensors["last"][3, 2] = float("nan")
    save_file(tensors, path)


def _shorter(path: Path) -> None:
    save_file({name: tensor[:5] for name, tensor in load_file(path).items()}, path)


def _without_lse(path: Path) -> None:
    tensors = load_file(path)
    del tensors["lse"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        _nan,
        _shorter,
        _without_lse,
    ],
    ids=["empty", "cut", "another", "not_finite", "shorter", "a_part_missing"],
)
def test_damaged_states_are_computed_again(
    damage: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One damaged file stops every later run, or is trained on."""
    target, sequences = tiny_target(), _sequences(9, 12)
    adapter = TargetAdapter(target, [0])
    source = StateSource(adapter, dtype=torch.float32, cache=_cache(tmp_path, target))
    before = source.get(sequences)
    for path in tmp_path.rglob("*.safetensors"):
        damage(path)
    with caplog.at_level(logging.WARNING, "dspark_hf"):
        again = StateSource(adapter, dtype=torch.float32, cache=_cache(tmp_path, target)).get(sequences)
    assert caplog.text.count("which cannot be used") == 2
    caplog.clear()
    # replaced, so that nothing is wrong any more
    last = StateSource(adapter, dtype=torch.float32, cache=_cache(tmp_path, target)).get(sequences)
    assert not caplog.text
    for name in ("context", "last", "lse"):
        assert torch.equal(getattr(again, name), getattr(before, name))
        assert torch.equal(getattr(last, name), getattr(before, name))


def test_a_divided_target_has_states(tmp_path: Path) -> None:
    """Training beside tensor parallelism ends in an error of NumPy's before its first step."""
    target = tiny_target("llama")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        weight = target.model.layers[0].mlp.up_proj.weight
        divided = distribute_tensor(weight.data, init_device_mesh("cpu", (1,)), [Shard(0)])
        target.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(divided)
        StateCache(tmp_path, TargetAdapter(target, [0]), dtype=torch.float32, max_bytes=0)
    finally:
        distributed.destroy_process_group()
