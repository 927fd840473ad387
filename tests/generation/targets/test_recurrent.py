"""Targets whose layers carry a state: their text with a drafter is that of plain `generate`."""

from __future__ import annotations

import threading
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedModel

from dspark_hf import DSparkAssistantModel, LookupAssistant, Request, generate_stream
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.scheduling.costs.workload import StepTimer
from dspark_hf.generation.targets import recurrent_support
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.generation.targets.recurrences import RECURRENCES, Watch, watching
from dspark_hf.generation.targets.recurrent import RecurrentStates
from dspark_hf.generation.targets.recurrent_support import can_recompute
from tests.closeness import assert_same_up_to_rounding
from tests.generation.drafters import MemorylessDrafter, ScriptedDrafter
from tests.generation.frequencies import smallest_p_value
from tests.generation.prompts import num_padded, ragged_prompts
from tests.generation.schedulers import EveryThirdRound
from tests.recurrent import RECURRENT_FAMILIES, available, recurrent_target, tiny_glm5_next
from tests.reference.sampling import SMALLEST_P_VALUE, text_probabilities
from tests.thinning import mostly_slow, slow
from tests.tiny import VOCAB_SIZE

# one of each recurrence, with attention in other layers, in the same layers, and without any
KINDS = available("qwen3_5_text", "kimi_linear", "falcon_h1", "mamba2", "mamba", "zamba", "lfm2")
# their attention is not that of several rows
SINGLE_ROW_ONLY = ("qwen4_exp_text",)
NEW_TOKENS = 10
WIDTH = 4


def _generate(target: PreTrainedModel, inputs: dict[str, Tensor], drafter: Drafter | None = None, **options: Any):
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return target.generate(**inputs, **options, **({} if drafter is None else {"assistant_model": drafter}))


def _drafter(kind: str, target: PreTrainedModel, text: Tensor, inputs: dict[str, Tensor]) -> Drafter:
    if kind == "random":
        drafter: Drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=5)
        drafter.scheduler = "fixed"
        return drafter
    accuracy = {"right": 1.0, "wrong": 0.0, "often right": 0.7}[kind]
    return ScriptedDrafter(target, text, num_padded(inputs), accuracy)


@pytest.mark.parametrize(
    ("family", "num_rows"),
    [((family, 1) if family in (*KINDS, *SINGLE_ROW_ONLY) else slow(family, 1)) for family in RECURRENT_FAMILIES]
    + [
        ((family, 3) if family in ("qwen3_5_text", "falcon_h1", "mamba2", "lfm2") else slow(family, 3))
        for family in KINDS
    ],
)
def test_text_is_that_of_plain_generate(family, num_rows):
    """A state keeps rejected drafts, or loses accepted ones, and the text changes."""
    target, inputs = recurrent_target(family), ragged_prompts(num_rows)
    plain = _generate(target, inputs)
    drafter = _drafter("often right", target, plain, inputs)
    assert torch.equal(_generate(target, inputs, drafter), plain)
    statistics = drafter.last_statistics
    assert 0 < statistics.num_accepted < statistics.num_verified


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("kind", ["random", "right", "wrong", "often right"])
@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_long_texts(family, kind, num_rows):
    """Over some two hundred rounds, rounding in a state that was run again adds up."""
    if num_rows > 1 and family in SINGLE_ROW_ONLY:
        pytest.skip("one row only")
    target, inputs = recurrent_target(family), ragged_prompts(num_rows)
    plain = _generate(target, inputs, max_new_tokens=200)
    drafter = _drafter(kind, target, plain, inputs)
    text = _generate(target, inputs, drafter, max_new_tokens=200)
    for row, other, padded in zip(text, plain, num_padded(inputs), strict=True):
        _assert_same_until_a_tie(target, row[padded:], other[padded:])


@torch.no_grad()
def _assert_same_until_a_tie(target: Any, text: Tensor, plain: Tensor) -> None:
    """Check that two texts are the same, at least up to where the best tokens are as close as rounding brings them."""
    first = (text != plain).nonzero().flatten().tolist()[:1]
    for index in first:
        logits = target(input_ids=plain[None, :index]).logits[0, -1]
        margin = logits[plain[index]] - logits[text[index]]
        assert abs(float(margin)) < 256 * torch.finfo(torch.float32).eps * float(logits.abs().max())


@pytest.mark.slow
@pytest.mark.skipif("glm5_next" not in CONFIG_MAPPING, reason="not in this version of Transformers")
@pytest.mark.parametrize("kind", ["right", "wrong", "often right"])
def test_glm5_next(kind):
    """A family that exists as a vision-language model alone is decoded wrongly."""
    target, inputs = tiny_glm5_next(), ragged_prompts(1)
    plain = _generate(target, inputs, max_new_tokens=40)
    drafter = _drafter(kind, target, plain, inputs)
    assert torch.equal(_generate(target, inputs, drafter, max_new_tokens=40), plain)


def test_without_a_rollback_the_text_changes(monkeypatch):
    """These tests pass whether states are taken back or not."""
    monkeypatch.setattr(RecurrentStates, "_advance_again", lambda *arguments: None)
    for family in available("qwen3_5_text", "kimi_linear", "mamba2", "mamba"):
        target, inputs = recurrent_target(family), ragged_prompts(1)
        plain = _generate(target, inputs)
        assert not torch.equal(_generate(target, inputs, _drafter("wrong", target, plain, inputs)), plain)


@torch.no_grad()
@pytest.mark.parametrize("family", mostly_slow(KINDS, available("qwen3_5_text", "kimi_linear", "mamba2")))
def test_state_is_that_of_a_fresh_pass(family):
    """What a call leaves in the user's cache is not what a pass over the text alone leaves."""
    target, inputs = recurrent_target(family), ragged_prompts(1)
    cache = DynamicCache(config=target.config)
    drafter = _drafter("often right", target, _generate(target, inputs), inputs)
    text = _generate(target, inputs, drafter, **{CACHE_KEY: cache})
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
    # the last token is not read yet
    fresh = target(input_ids=text[:, :-1], use_cache=True)[CACHE_KEY]
    pairs = list(zip(_tensors(cache), _tensors(fresh), strict=True))
    assert pairs
    for state, expected in pairs:
        assert_same_up_to_rounding(state, expected)


def _tensors(cache: Any) -> list[Tensor]:
    layers = RecurrentStates(cache.layers).layers
    states = [state for layer in layers for state in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    return [state for state in states if state is not None]


@torch.no_grad()
@pytest.mark.parametrize("family", [*KINDS, *available("nemotron_h")])
def test_rows_keep_their_own_number_of_tokens(family):
    """A row's state is taken back to another row's number of tokens, or a step of time is passed for what is not."""
    target = recurrent_target(family)
    for name, parameter in target.named_parameters():
        if "dt_bias" in name:
            # steps of time below the floor under them, which one-token passes of Nemotron-H do not have
            parameter.fill_(-9.0)
    assert can_recompute(target)
    kept = [0, 1, 3, WIDTH]
    ids = torch.randint(2, VOCAB_SIZE, (len(kept), 6 + WIDTH))
    cache = target(input_ids=ids[:, :6], use_cache=True)[CACHE_KEY]
    states = RecurrentStates(cache.layers)
    with states.watched(WIDTH, are_drafts=True):
        _go_on(target, ids, 6, 6 + WIDTH, cache)
    states.keep(kept)
    rows = []
    for row, count in enumerate(kept):
        alone = target(input_ids=ids[row : row + 1, :6], use_cache=True)[CACHE_KEY]
        for start in range(6, 6 + count):
            _go_on(target, ids[row : row + 1], start, start + 1, alone)
        rows.append(_tensors(alone))
    for state, expected in zip(_tensors(cache), zip(*rows, strict=True), strict=True):
        assert_same_up_to_rounding(state, torch.cat(expected))


def _go_on(target: Any, ids: Tensor, start: int, end: int, cache: Any) -> None:
    positions = {} if "mamba" in target.config.model_type else {"position_ids": torch.arange(start, end)[None]}
    target(input_ids=ids[:, start:end], use_cache=True, **{CACHE_KEY: cache}, **positions)


@pytest.mark.parametrize(
    ("family", "num_rows"),
    [
        (pytest.param if case in (("qwen3_5_text", 3), ("falcon_h1", 1), ("mamba", 3)) else slow)(*case)
        for case in product(RECURRENT_FAMILIES, (1, 3))
    ],
)
def test_second_turns(family, num_rows):
    """A turn that goes on with the cache of the last one is not the one that starts anew."""
    if num_rows > 1 and family in SINGLE_ROW_ONLY:
        pytest.skip("one row only")
    target, inputs = recurrent_target(family), ragged_prompts(num_rows)
    cache = DynamicCache(config=target.config)
    drafter = _drafter("often right", target, _generate(target, inputs), inputs)
    first = _generate(target, inputs, drafter, **{CACHE_KEY: cache})
    ids = torch.cat([first, torch.randint(2, VOCAB_SIZE, (num_rows, 5))], dim=1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    whole = {"input_ids": ids, "attention_mask": mask}
    # transformers 5.24: a floor under the time step tells these apart in plain `generate`, too
    kept = {CACHE_KEY: DynamicCache(config=target.config)} if family in ("nemotron_h", "zamba2") else {}
    if kept:
        _generate(target, inputs, **kept)
    anew = _generate(target, whole, **kept)
    # transformers 5.24: a cache of states alone does not say what it holds, so what is new is passed alone
    new = {**whole, "input_ids": ids[:, first.shape[1] - 1 :]} if all(cache.is_linear) else whole
    second = _generate(target, new, _drafter("often right", target, anew, whole), **{CACHE_KEY: cache})
    assert torch.equal(second[:, -NEW_TOKENS:], anew[:, -NEW_TOKENS:])


@pytest.mark.parametrize(
    "family", mostly_slow(available("qwen3_5_text", "falcon_h1", "lfm2"), available("qwen3_5_text"))
)
def test_third_turns_of_padded_rows(family):
    """The cache of a second turn holds, behind rows that were padded in the first, tokens that nobody wrote there."""
    target = recurrent_target(family)
    chats = []
    for is_assisted in (False, True):
        inputs, cache = ragged_prompts(3), DynamicCache(config=target.config)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        generator, texts = torch.Generator().manual_seed(3), []
        for _ in range(3):
            drafter = LookupAssistant() if is_assisted else None
            texts.append(_generate(target, {"input_ids": ids, "attention_mask": mask}, drafter, **{CACHE_KEY: cache}))
            ids = torch.cat([texts[-1], torch.randint(2, VOCAB_SIZE, (3, 5), generator=generator)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        chats.append(texts)
    assert all(torch.equal(ours, plain) for plain, ours in zip(*chats, strict=True))


@pytest.mark.parametrize("family", mostly_slow(RECURRENT_FAMILIES, available("qwen3_5_text", "mamba")))
def test_streams(family):
    """A request that joins, or leaves, changes states of others."""
    if family in SINGLE_ROW_ONLY:
        pytest.skip("one row only")
    target = recurrent_target(family)
    sizes = ((5, 10), (9, 3), (3, 8), (1, 6))
    requests = [
        Request(torch.randint(2, VOCAB_SIZE, (length,)), {"max_new_tokens": count, "do_sample": False}, key=i)
        for i, (length, count) in enumerate(sizes)
    ]
    alone = [target.generate(request.input_ids[None], **request.options)[0] for request in requests]
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=5)
    finished = list(generate_stream(target, requests, drafter=drafter, max_rows=2, scheduler="fixed"))
    assert len(finished) == len(requests)
    for one in finished:
        assert one.error is None
        assert torch.equal(one.token_ids, alone[one.request.key])


@pytest.mark.parametrize("family", available("qwen3_5_text", "kimi_linear", "mamba"))
def test_rounds_without_drafts(family):
    """A window of a convolution grows, or moves without its state, in rounds that draft nothing."""
    target, inputs = recurrent_target(family), ragged_prompts(1)
    plain = _generate(target, inputs)
    drafter = _drafter("often right", target, plain, inputs)
    drafter.scheduler = EveryThirdRound()
    assert torch.equal(_generate(target, inputs, drafter), plain)


@pytest.mark.parametrize("family", available("qwen3_5_text", "mamba"))
def test_chunked_prefill(family):
    """A prompt that is to be read in chunks is read from an empty state again."""
    target, inputs = recurrent_target(family), ragged_prompts(1)
    plain = _generate(target, inputs)
    drafter = _drafter("often right", target, plain, inputs)
    assert torch.equal(_generate(target, inputs, drafter, prefill_chunk_size=4), plain)


@pytest.mark.parametrize("family", available("falcon_h1", "mamba"))
def test_rows_that_end_early(family):
    """The state of a row that has ended waits at its end, where that of plain `generate` reads padding."""
    target, inputs = recurrent_target(family), ragged_prompts(3)
    free = _generate(target, inputs)
    options = {"eos_token_id": int(free[1, -NEW_TOKENS // 2]), "pad_token_id": 0}
    caches = [DynamicCache(config=target.config) for _ in range(2)]
    plain = _generate(target, inputs, **options, **{CACHE_KEY: caches[0]})
    assert int((plain == 0).sum()) > int((inputs["attention_mask"] == 0).sum())
    drafter = _drafter("often right", target, free, inputs)
    assert torch.equal(_generate(target, inputs, drafter, **options, **{CACHE_KEY: caches[1]}), plain)
    for state, expected in zip(_tensors(caches[1]), _tensors(caches[0]), strict=True):
        assert_same_up_to_rounding(state, expected)


@pytest.mark.parametrize("num_passes", [1, 2])
def test_interrupted_turns(num_passes):
    """After an error within a prompt that is read in chunks, a state is ahead of keys and values."""
    target, inputs = recurrent_target("qwen3_5_text"), ragged_prompts(1)
    cache = DynamicCache(config=target.config)
    drafter = _drafter("wrong", target, _generate(target, inputs), inputs)
    first = _generate(target, inputs, drafter, **{CACHE_KEY: cache})
    ids = torch.cat([first, torch.randint(2, VOCAB_SIZE, (1, 5))], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before, length, seen = [state.clone() for state in _tensors(cache)], cache.get_seq_length(), 0

    def interrupt(module, args):
        nonlocal seen
        seen += 1
        if seen == num_passes:
            raise KeyboardInterrupt

    with target.get_decoder().layers[2].register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
        _generate(target, turn, drafter, prefill_chunk_size=3, **{CACHE_KEY: cache})
    assert cache.get_seq_length() == length
    assert all(torch.equal(state, old) for state, old in zip(_tensors(cache), before, strict=True))


@pytest.mark.parametrize("family", [*available("mamba2"), pytest.param("qwen3_5_text", marks=pytest.mark.slow)])
def test_sampled_text_follows_the_targets_distribution(family):
    """States are taken back to other tokens than those that were sampled."""
    target = recurrent_target(family, vocab_size=6)
    prompt, num_tokens = torch.tensor([1, 4, 2]), 4
    laws = torch.randn(6, 6)
    drafter = MemorylessDrafter(lambda slot, previous: laws[previous], 6, 3)
    drafter.scheduler = "fixed"
    options = {"max_new_tokens": num_tokens, "do_sample": True, "assistant_model": drafter}
    samples = target.generate(prompt.expand(1000, -1), **options)[:, len(prompt) :]
    statistics = drafter.last_statistics
    assert 0.1 < statistics.num_accepted / statistics.num_verified < 0.9
    assert smallest_p_value(samples, text_probabilities(target, prompt, num_tokens)) > SMALLEST_P_VALUE


def test_other_threads_are_not_watched():
    """A pass of another thread over the same family is taken for one over drafts."""
    target, ids = recurrent_target("qwen3_5_text"), torch.arange(2, 9)[None]
    assert can_recompute(target)
    expected, found = target(input_ids=ids, use_cache=True).logits, []
    watch = Watch([], are_drafts=True)
    with watching(watch):
        other = threading.Thread(target=lambda: found.append(target(input_ids=ids, use_cache=True).logits))
        other.start()
        other.join()
    assert torch.equal(found[0], expected)
    assert not watch.calls


@pytest.mark.parametrize("family", available("qwen3_5_text", "kimi_linear", "mamba2", "mamba", "lfm2"))
def test_unknown_families_are_tried(family, monkeypatch):
    """A family that nobody has tested is refused although its recurrence is known, or served although it is not."""
    monkeypatch.setattr(recurrent_support, "_KNOWN", {})
    target = recurrent_target(family)
    assert can_recompute(target)
    with pytest.raises(ValueError, match="several rows"):
        _generate(target, ragged_prompts(3), _drafter("wrong", target, torch.zeros(3, 1).long(), ragged_prompts(3)))
    if family == "lfm2":
        return
    others = recurrent_target(family)
    monkeypatch.setattr(RecurrentStates, "_advance_again", lambda *arguments: None)
    assert not can_recompute(others)
    inputs = ragged_prompts(1)
    with pytest.raises(ValueError, match="what was taken back was not the state of the kept tokens"):
        _generate(others, inputs, _drafter("wrong", others, inputs["input_ids"], inputs))


def test_a_recurrence_that_is_not_seen(monkeypatch):
    """A target whose recurrence runs elsewhere keeps rejected drafts without a word."""
    target, inputs = recurrent_target("qwen3_5_text"), ragged_prompts(1)
    plain = _generate(target, inputs)
    monkeypatch.setattr(Watch, "run", lambda self, recurrence, function, call: function(*call.args, **call.kwargs))
    with pytest.raises(RuntimeError, match="must see every recurrence of a pass, got 0 for 2 states"):
        _generate(target, inputs, _drafter("wrong", target, plain, inputs))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_costs_can_be_measured(num_rows):
    """`dspark-hf profile` refuses a target that `generate` serves, or measures passes over an empty state."""
    target = recurrent_target("qwen3_5_text")
    with TargetAdapter(target, [0]) as adapter:
        timer = StepTimer(adapter, None)
        for width in (1, 4, 2):
            assert timer.verify_seconds(num_rows, 9, width) > 0


def test_every_recurrence_has_a_family():
    """A recurrence of the table is tested by no family."""
    modules = [__import__(type(recurrent_target(family).get_decoder()).__module__, fromlist=["_"]) for family in KINDS]
    for name, recurrence in RECURRENCES.items():
        assert CACHE_KEY != "cache" or any(
            hasattr(module, name) and hasattr(module, recurrence.step) for module in modules
        )
