"""Which costs a call of `generate` finds, and what it takes to find them."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation import packing
from dspark_hf.generation.packing import can_pack, forget_packed, multiplies_packed
from dspark_hf.generation.scheduling import Batch, CallInfo, RoundOutcome, reset_learned_state
from dspark_hf.generation.scheduling.costs import profile
from dspark_hf.generation.scheduling.costs.keys import drafter_key, profile_key
from dspark_hf.generation.scheduling.costs.profile import (
    describe_costs,
    find_profile,
    measure_calls,
    measure_costs,
    online_costs,
)
from dspark_hf.generation.scheduling.costs.storing import profile_path, save_profile
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable
from dspark_hf.generation.scheduling.costs.workload import StepTimer
from dspark_hf.generation.targets.adapter import TargetAdapter
from tests.generation.prompts import ragged_prompts
from tests.thinning import slow
from tests.tiny import tiny_target

BLOCK_SIZE = 5


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has measured nothing yet."""
    monkeypatch.setattr(profile, "_TABLES", {})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int, int]]]:
    """The passes of every measurement, none of which takes time."""
    calls: list[list[tuple[int, int, int]]] = []

    def measure(workload: StepTimer, passes: Any, drafts: Any, *, repeats: int) -> CostTable:
        calls.append(passes)
        return CostTable(*(CostCurves({point: 0.01 * point[2] for point in points}) for points in (passes, drafts)))

    monkeypatch.setattr(profile, "measure_costs", measure)
    return calls


def _drafter(target: PreTrainedModel, **fields: Any) -> DSparkAssistantModel:
    options = {"num_hidden_layers": 1, "markov_rank": 8, "block_size": BLOCK_SIZE}
    return DSparkAssistantModel.from_target(target, **{**options, **fields})


def _call(target: PreTrainedModel | None = None, **fields: Any) -> CallInfo:
    target = target or tiny_target(max_position_embeddings=100_000)
    drafter = fields.pop("drafter", None) or _drafter(target)
    options = {"num_rows": 1, "max_drafts": BLOCK_SIZE, "prompt_length": 20, **fields}
    return CallInfo(TargetAdapter(target, drafter.target_layer_ids), drafter, **options)


def _key(**fields: Any) -> Any:
    return profile_key(TargetAdapter(tiny_target(**fields)))


def test_what_costs_something_is_in_the_key(monkeypatch):
    """Costs of one model, dtype or machine are used for another."""
    keys = [
        _key(),
        _key(family="qwen3"),
        _key(intermediate_size=96),
        _key(num_hidden_layers=3),
        _key(attn_implementation="eager"),
        _key(num_attention_heads=8, num_key_value_heads=4, head_dim=4),
        _key(hidden_act="gelu"),
        _key(family="mistral"),
        _key(family="mistral", sliding_window=16),
        _key(family="gemma3_text"),
        _key(family="gemma3_text", layer_types=["sliding_attention"] * 3 + ["full_attention"]),
        _key(family="qwen3_moe"),
        _key(family="qwen3_moe", num_experts_per_tok=3),
        profile_key(TargetAdapter(tiny_target().bfloat16())),
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    keys.append(_key())
    assert len({key.file_name for key in keys}) == len(keys)


def test_what_costs_nothing_is_not_in_the_key(tmp_path):
    """The same model is measured again for other weights, or from another folder."""
    target = tiny_target()
    target.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert _key() == _key(seed=2) == _key(eos_token_id=3) == profile_key(TargetAdapter(other))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_cache": False, "initializer_range": 0.01},
        {"attention_dropout": 0.1, "rms_norm_eps": 1e-5},
        {"max_position_embeddings": 4096},
        {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 500_000}},
        {"unsloth_version": "2026.1", "unsloth_fixed": True},
    ],
)
def test_a_fine_tuned_model_shares_the_profile_of_its_base(fields):
    """A fine-tuned model is measured again for what its trainer wrote into the configuration."""
    assert _key(**fields) == _key()


class _Int8Linear(nn.Module):
    """A linear layer with its weight in eight bits."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale.detach())


@pytest.mark.parametrize("keeps_parameters", [True, False])
def test_quantised_weights_are_told_apart(keeps_parameters):
    """Costs of full weights are used after they were quantised in place, as for the target so for its drafter."""
    target = tiny_target()
    drafter = _drafter(target)
    keys = [profile_key(TargetAdapter(target)), drafter_key(drafter)]
    for layer in (target.model.layers[0], drafter.layers[0]):
        layer.mlp.up_proj = _Int8Linear(layer.mlp.up_proj) if keeps_parameters else nn.Identity()
    assert profile_key(TargetAdapter(target)) != keys[0]
    assert drafter_key(drafter) != keys[1]


def test_later_calls_look_at_few_weights(monkeypatch):
    """Every call of `generate` walks over all weights of a model with ten thousand experts."""
    experts: Any = nn.ModuleList(nn.Linear(1, 1) for _ in range(500))
    key = drafter_key(experts)
    looks: list[str] = []
    get = nn.Module.get_parameter

    def look(module: nn.Module, name: str) -> nn.Parameter:
        looks.append(name)
        return get(module, name)

    monkeypatch.setattr(nn.Module, "get_parameter", look)
    assert drafter_key(experts) == key
    assert 32 <= len(looks) <= 64
    assert drafter_key(experts.half()) != key


def test_a_drafter_elsewhere_is_another():
    """A drafter that was moved to another device keeps the costs it had."""
    drafter = _drafter(tiny_target())
    key = drafter_key(drafter)
    assert drafter_key(drafter.to("meta")) != key


def test_drafters_are_told_apart():
    """A small drafter's costs are used for a large one; or a calibration makes another drafter."""
    target = tiny_target()
    drafters = [_drafter(target), _drafter(target, num_hidden_layers=2), _drafter(target, markov_rank=4)]
    drafters.append(_drafter(target).bfloat16())
    assert len(set(map(drafter_key, drafters))) == 4
    calibrated = _drafter(target)
    calibrated.config.sts_temperatures = [1.5] * BLOCK_SIZE
    assert drafter_key(calibrated) == drafter_key(drafters[0])


def test_models_on_several_devices(monkeypatch):
    """A model that is loaded from disk layer by layer passes for one that is not."""
    target = tiny_target()
    plain = profile_key(TargetAdapter(target)).device
    target.hf_device_map = {"": "cpu"}
    assert profile_key(TargetAdapter(target)).device == plain
    target.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    assert profile_key(TargetAdapter(target)).device == f"{plain} and disk"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    target.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "model.embed_tokens": 0}
    assert profile_key(TargetAdapter(target)).device == "2 x Some GPU"


def test_measured_once(measured, profiles, monkeypatch):
    """Every call measures, or another process does again."""
    call = _call()
    assert online_costs(call).profile is None
    table = find_profile(call)
    assert find_profile(call) is table
    assert online_costs(_call(num_rows=1, prompt_length=300)).profile is table
    assert len(measured) == 1
    assert not profiles.exists()


def test_a_quick_measurement_ends_with_its_process(measured, profiles):
    """What a call measured beside other programs decides in all later processes."""
    find_profile(call := _call())
    assert not profiles.exists()
    # a new process
    reset_learned_state()
    assert online_costs(call).profile is None
    find_profile(call)
    assert len(measured) == 2


def test_what_is_missing_is_added(measured):
    """More rows, longer blocks or far longer prompts rest on guesses; or what was known before is lost."""
    target = tiny_target(max_position_embeddings=100_000)
    first = find_profile(_call(target))
    find_profile(_call(target, num_rows=4))
    assert len(measured) == 2
    find_profile(_call(target, num_rows=3))
    assert len(measured) == 2
    table = find_profile(_call(target, prompt_length=30_000))
    assert len(measured) == 3
    assert {context for _, context, _ in measured[2]} == {30_000}
    assert set(first.verify.points) < set(table.verify.points)
    assert table.covers(4, BLOCK_SIZE, 128) and table.covers(1, BLOCK_SIZE, 10_000)


def test_what_was_stored_stays(measured):
    """A thorough profile is written over by a quick measurement of what it lacks, such as another drafter's blocks."""
    call = _call()
    target, other = call.target.model, _drafter(call.target.model, markov_rank=4)
    thorough = {(1, 128, size): 0.5 for size in range(1, BLOCK_SIZE + 2)}
    table = CostTable(CostCurves(thorough), CostCurves({(1, 128, 1): 0.25}))
    save_profile(profile_key(call.target), drafter_key(call.drafter), table, describe_costs(call.target))
    for lacking in (call, _call(target, num_rows=2), _call(target, drafter=other)):
        found = find_profile(lacking).verify.points
        assert {point: found[point] for point in thorough} == thorough
    assert len(measured) == 3
    assert online_costs(call).profile.draft.points[1, 128, 1] == 0.25


@pytest.mark.parametrize(
    ("name", "places", "is_told"),
    [
        ("a-model", {"": "cpu"}, True),
        ("", {"": "cpu"}, False),
        ("a-model", {"layers.0": "cpu", "head": "disk"}, False),
    ],
)
def test_the_command_is_named_where_it_helps(measured, monkeypatch, name, places, is_told):
    """A user is sent to a command that cannot load this target, or never hears of it."""
    told: list[str] = []
    monkeypatch.setattr(profile.logger, "warning_once", told.append)
    target = tiny_target(max_position_embeddings=100_000)
    target.config.name_or_path, target.hf_device_map = name, places
    find_profile(_call(target))
    assert ["`dspark-hf profile`" in one for one in told] == [is_told]


def test_a_call_without_a_profile_leaves_others_theirs(measured):
    """A stream loses its profile, and fails, when a larger batch is decoded meanwhile."""
    target = tiny_target(max_position_embeddings=100_000)
    call = _call(target)
    table = find_profile(call)
    costs = online_costs(call)
    larger = online_costs(_call(target, drafter=call.drafter, num_rows=16))
    assert larger.profile is None
    assert costs.profile is table
    assert costs.draft_seconds(1, 3, 100) > 0
    # what one of them learns, the other knows
    batch = Batch((BLOCK_SIZE,), 1, 100)
    for _ in range(8):
        costs.observe(RoundOutcome(batch, 0, [0], [0], 0.0, 1.0))
        costs.observe(RoundOutcome(batch, 2, [2], [0], 1.0, 1.0))
    assert larger.knows(1)


def test_another_drafter_keeps_the_first(measured):
    """Two drafters of a target take turns in being measured."""
    target = tiny_target(max_position_embeddings=100_000)
    first, second = _call(target), _call(target, drafter=_drafter(target, markov_rank=4))
    find_profile(first)
    find_profile(second)
    assert len(measured) == 2
    assert online_costs(first).profile is not None
    assert online_costs(second).profile is not None


def test_a_new_profile_is_noticed(measured):
    """A process that runs on uses what it measured quickly although a thorough profile was stored meanwhile."""
    call = _call()
    find_profile(call)
    points = {(1, 128, size): 0.5 for size in range(1, BLOCK_SIZE + 2)}
    table = CostTable(CostCurves(points), CostCurves(points))
    save_profile(profile_key(call.target), drafter_key(call.drafter), table, describe_costs(call.target))
    assert find_profile(call).verify_seconds(1, 1, 128) == 0.5
    assert len(measured) == 1


def test_a_damaged_file_stands_in_no_ones_way(measured, profiles):
    """A damaged profile stops every call, makes each of them measure, or is written over by a quick measurement."""
    call = _call()
    path = profile_path(profile_key(call.target))
    path.parent.mkdir(parents=True)
    path.write_text("{", encoding="utf-8")
    assert find_profile(call) is find_profile(call)
    assert len(measured) == 1
    assert path.read_text(encoding="utf-8") == "{"


def test_disturbed_measurements_are_repeated(monkeypatch):
    """Costs that were measured while other programs ran are believed."""
    call, turns, told = _call(), [], []
    monkeypatch.setattr(profile.logger, "warning", told.append)

    def seconds(self: StepTimer, num_rows: int, context: int, width: int) -> float:
        turns.append(width)
        # other programs run during the first series, or always
        is_busy = width == 3 and (is_always or len(turns) <= 8)
        return 9.0 if is_busy else 1.0 * width

    monkeypatch.setattr(StepTimer, "verify_seconds", seconds)
    points = [(1, 16, width) for width in (3, 4)]
    for is_always in (False, True):
        turns.clear()
        table = measure_costs(StepTimer(call.target, call.drafter), points, [], repeats=3)
        assert table.verify.points == {(1, 16, 3): 4.0 if is_always else 3.0, (1, 16, 4): 4.0}
        assert len(turns) == (24 if is_always else 16)
        assert len(told) == is_always


@pytest.mark.skipif(not can_pack(), reason="no products with packed weights here")
def test_calls_are_measured_as_they_are_made(monkeypatch):
    """The doctor, or a forecast, promises what weights as they were loaded give, or compares with a plain step that
    plain `generate` does not make."""
    call, were_packed = _call(), {}
    monkeypatch.setattr(packing, "LEAST_BYTES", 0)

    def seconds(self: StepTimer, num_rows: int, context: int, size: int) -> float:
        were_packed[size] = multiplies_packed(call.target.model), multiplies_packed(call.drafter)
        return 1.0 + size

    monkeypatch.setattr(StepTimer, "verify_seconds", seconds)
    monkeypatch.setattr(StepTimer, "draft_seconds", lambda *point: seconds(*point[:3], 10 * point[3]))
    points = [(1, 16, width) for width in (1, 3, 4)]
    table = measure_calls(call.target, call.drafter, points, [(1, 16, 2)], repeats=1)
    assert were_packed == {1: (False, False), 3: (True, True), 4: (True, True), 20: (True, True)}
    assert table.verify.points == {(1, 16, 1): 2.0, (1, 16, 3): 4.0, (1, 16, 4): 5.0}
    assert table.draft.points == {(1, 16, 2): 21.0}
    forget_packed()


def test_contexts_stay_within_the_targets_positions(measured):
    """A learned position embedding is asked for a position it does not have."""
    find_profile(_call(tiny_target("gpt2", max_position_embeddings=64)))
    assert {context for _, context, _ in measured[0]} == {64 - BLOCK_SIZE - 1}


def test_absent_profiles_cost_a_look(measured, monkeypatch):
    """Every call of `generate` reads a file or writes out a configuration."""
    call = _call()
    online_costs(call)

    def fail(*args: object) -> None:
        raise AssertionError("too much work")

    monkeypatch.setattr(profile, "load_profile", fail)
    monkeypatch.setattr(type(call.target.model.config), "to_dict", fail)
    assert online_costs(call).profile is None
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [slow("hardware_aware", 3), ("asynchronous", 1), slow("hardware_aware", 1), slow("asynchronous", 3)],
)
def test_measuring_changes_no_text(name, num_rows, monkeypatch):
    """What is sampled depends on whether a profile was there, or greedy text is not that of plain `generate`."""
    target = tiny_target()
    drafter = _drafter(target)
    inputs = ragged_prompts(num_rows)
    texts = []
    measured = []
    monkeypatch.setattr(
        profile, "measure_costs", lambda *args, **options: measured.append(None) or measure_costs(*args, **options)
    )
    for _ in range(2):
        torch.manual_seed(7)
        texts.append(
            target.generate(**inputs, max_new_tokens=12, do_sample=True, assistant_model=drafter, scheduler=name)
        )
        assert len(measured) == 1
    assert torch.equal(*texts)
    reset_learned_state()
    options = {**inputs, "max_new_tokens": 12, "do_sample": False}
    plain = target.generate(**options)
    assert torch.equal(target.generate(**options, assistant_model=drafter, scheduler=name), plain)


def test_measuring_leaves_other_threads_draws_alone(monkeypatch):
    """While one thread measures, another samples; when the generator is put back, it draws the same once more."""
    target = tiny_target()
    drafter = _drafter(target)
    forward = type(target).forward

    # it takes what the forward pass takes
    @wraps(forward)
    def sample_meanwhile(*args: Any, **options: Any) -> Any:
        torch.rand(())
        return forward(*args, **options)

    monkeypatch.setattr(type(target), "forward", sample_meanwhile)
    generator = torch.get_rng_state()
    with TargetAdapter(target, drafter.target_layer_ids) as adapter:
        measure_costs(StepTimer(adapter, drafter), [(1, 16, 1)], [], repeats=1)
    assert not torch.equal(torch.get_rng_state(), generator)


def test_measuring_draws_nothing():
    """A target in training mode draws dropout while it is measured, and the caller's next sample is another."""
    target = tiny_target(attention_dropout=0.5).train()
    drafter = _drafter(target)
    generator = torch.get_rng_state()
    with TargetAdapter(target, drafter.target_layer_ids) as adapter:
        table = measure_costs(StepTimer(adapter, drafter), [(2, 16, 1), (2, 16, 3)], [(1, 16, 2)], repeats=1)
    assert torch.equal(torch.get_rng_state(), generator)
    # of drafts too whose shape no pass has
    assert (set(table.verify.points), set(table.draft.points)) == ({(2, 16, 1), (2, 16, 3)}, {(1, 16, 2)})


def test_few_pairs_are_remembered(monkeypatch):
    """A process that tries many models keeps what it has learnt of every one of them, for ever."""
    monkeypatch.setattr(profile, "_MOST_KNOWN", 3)
    calls = [_call(tiny_target(intermediate_size=16 * size)) for size in range(1, 6)]
    costs = [profile.online_costs(call) for call in calls]
    assert len(profile._ONLINE) == len(profile._TABLES) == 3
    # the latest are those that stay
    kept = profile._ONLINE[profile._keys(calls[-1])]
    assert kept is not costs[0]
    assert profile._keys(calls[0]) not in profile._ONLINE
