"""Rollback leaves no trace: caches equal those of a fresh prefill of the committed tokens."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation import decoding
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.drafting.context import DeferredContext
from dspark_hf.generation.ragged_store import RaggedStore
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.generation.schedulers import EveryThirdRound
from tests.thinning import mostly_slow, slow
from tests.tiny import FAMILIES, tiny_target

SEEDS = (0, slow(1), slow(2))
# without and with sliding layers, with layers that share keys and values, and with learned positions
QUICK_FAMILIES = ("llama", "gemma3_text", "gemma4_text", "gpt2")
# the first turn with a drafter or without, the second with the whole text or its end alone
QUICK_TURNS = [(True, False, "gemma3_text"), (False, True, "llama"), (True, True, "llama")]


def _layers(cache):
    return [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]


def _fresh_cache(target, tokens):
    return getattr(target(input_ids=tokens, use_cache=True), CACHE_KEY)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, QUICK_FAMILIES))
def test_single_row_cache_equals_fresh_prefill(family, seed):
    """A rejected draft stays in the target's cache, or an accepted one is missing."""
    target = tiny_target(family)
    inputs = ragged_prompts(1, seed=seed)
    plain = target.generate(**inputs, max_new_tokens=15, do_sample=False)
    drafter = ScriptedDrafter(target, plain, [0], 0.6)
    drafter.generator.manual_seed(seed)
    output = target.generate(
        **inputs, max_new_tokens=15, do_sample=False, assistant_model=drafter, return_dict_in_generate=True
    )
    assert 0 < output.statistics.num_accepted < output.statistics.num_verified
    fresh = _fresh_cache(target, output.sequences[:, :-1])
    for (keys, values), (fresh_keys, fresh_values) in zip(_layers(output[CACHE_KEY]), _layers(fresh), strict=True):
        torch.testing.assert_close(keys, fresh_keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, fresh_values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, QUICK_FAMILIES))
def test_ragged_cache_equals_fresh_prefill(family, seed):
    """Rows of a batch share slots, or a rollback of one row touches another."""
    target = tiny_target(family)
    inputs = ragged_prompts(4, seed=seed)
    padded = num_padded(inputs)
    plain = target.generate(**inputs, max_new_tokens=15, do_sample=False)
    drafter = ScriptedDrafter(target, plain, padded, 0.6)
    output = target.generate(
        **inputs, max_new_tokens=15, do_sample=False, assistant_model=drafter, return_dict_in_generate=True
    )
    for row, num_pad in enumerate(padded):
        fresh = _fresh_cache(target, output.sequences[row : row + 1, num_pad:-1])
        for (keys, values), (fresh_keys, fresh_values) in zip(_layers(output[CACHE_KEY]), _layers(fresh), strict=True):
            length = fresh_keys.shape[2]
            torch.testing.assert_close(keys[row, :, -length:], fresh_keys[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(values[row, :, -length:], fresh_values[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scheduler", ["fixed", EveryThirdRound()], ids=["fixed", "every third round"])
def test_drafter_context_equals_one_from_scratch(scheduler, num_rows, seed, monkeypatch):
    """The drafter's context misses a position, holds a rejected one, or stands at the wrong place."""
    target = tiny_target("llama")
    inputs = ragged_prompts(num_rows, seed=seed)
    padded = num_padded(inputs)
    plain = target.generate(**inputs, max_new_tokens=15, do_sample=False)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=2, markov_rank=8, block_size=5)
    drafter.scheduler = scheduler
    contexts, deferred = [], []
    start = drafter.start

    def scripted_start(adapter, batch_size):
        real = start(adapter, batch_size)
        scripted = ScriptedDrafter(target, plain, padded, 0.6).start(adapter, batch_size)
        real.draft = scripted.draft
        contexts.append(real)
        return real

    def recorded(context):
        deferred.append(DeferredContext(context))
        return deferred[-1]

    monkeypatch.setattr(drafter, "start", scripted_start)
    monkeypatch.setattr(decoding, "DeferredContext", recorded)
    output = target.generate(
        **inputs, max_new_tokens=15, do_sample=False, assistant_model=drafter, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, plain)
    assert 0 < output.statistics.num_accepted < output.statistics.num_verified
    # the last rounds' hidden states wait for drafts that nobody asked for
    deferred[0].catch_up()
    cache = contexts[0].cache
    for row, num_pad in enumerate(padded):
        # the last token was never processed
        tokens = output.sequences[row : row + 1, num_pad:-1]
        states = target(input_ids=tokens, output_hidden_states=True).hidden_states
        taps = torch.cat([states[i + 1] for i in drafter.target_layer_ids], dim=-1)
        positions = torch.arange(tokens.shape[1])[None]
        expected = drafter.context_keys_and_values(drafter.project_context(taps), positions)
        assert cache.lengths.host[row] == tokens.shape[1]
        for layer, (keys, values) in enumerate(expected):
            kept_keys, kept_values = cache.read(layer)
            torch.testing.assert_close(kept_keys[row, :, : tokens.shape[1]], keys[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(kept_values[row, :, : tokens.shape[1]], values[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("first_with_drafter", "ids_repeat_the_past", "family"),
    [
        (pytest.param if case in QUICK_TURNS else slow)(*case)
        for case in product((True, False), (True, False), QUICK_FAMILIES)
    ],
)
def test_second_turn_continues_from_the_returned_cache(first_with_drafter, ids_repeat_the_past, family):
    """A conversation that hands its cache on goes another way with a drafter than without."""
    target = tiny_target(family)
    inputs = ragged_prompts(1)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    follow_up = torch.tensor([[9, 33, 4]])

    def second_turn(first_options, second_options):
        first = target.generate(
            **inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, **first_options
        )
        ids = torch.cat([first.sequences, follow_up], dim=1)
        mask = torch.ones_like(ids)
        past = first[CACHE_KEY]
        if not ids_repeat_the_past:
            ids = ids[:, past.get_seq_length() :]
        return target.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **{CACHE_KEY: past}, **second_options
        )

    plain = second_turn({}, {})
    assisted = {"assistant_model": drafter}
    assert torch.equal(second_turn(assisted if first_with_drafter else {}, assisted), plain)
    # what the first turn's cache restored has no hidden states: the context holds the new tokens only
    assert drafter.last_statistics.num_rounds > 0


@pytest.mark.parametrize("family", [slow("llama"), "gemma3_text"])
def test_second_turn_of_a_batch(family):
    """The cache of a ragged batch cannot be handed on."""
    target = tiny_target(family)
    inputs = ragged_prompts(3)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    follow_up = torch.tensor([[9, 33, 4]]).expand(3, -1)

    def second_turn(options):
        first = target.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, **options)
        ids = torch.cat([first.sequences, follow_up], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 15, dtype=torch.long)], dim=1)
        return target.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **{CACHE_KEY: first[CACHE_KEY]}, **options
        )

    assert torch.equal(second_turn({"assistant_model": drafter}), second_turn({}))


def test_a_cache_of_the_user_is_filled_in_place():
    """A cache that the user passed is left empty or stale."""
    target = tiny_target("llama")
    inputs = ragged_prompts(3)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    from transformers import DynamicCache

    cache = DynamicCache(config=target.config)
    output = target.generate(
        **inputs, max_new_tokens=12, do_sample=False, assistant_model=drafter, **{CACHE_KEY: cache}
    )
    assert cache.get_seq_length() == output.shape[1] - 1


def _filled(lengths):
    """Return a store whose row r holds `lengths[r]` random tokens, and these `(1, H, T, E)` by row."""
    store, states = RaggedStore(), torch.randn(len(lengths), 2, max(lengths), 4)
    store.write(states, -states, [0] * len(lengths), torch.zeros(len(lengths), dtype=torch.long))
    return store, [states[row : row + 1, :, :length] for row, length in enumerate(lengths)]


@pytest.mark.parametrize("joining", [[20, 30], [300]])
def test_rows_that_join_find_room_for_those_that_are_there(joining):
    """The room of a long row that left stays for good, so that a stream's memory never falls; or a row is cut off."""
    store, rows = _filled([1000, 40])
    store.select_rows(torch.tensor([1]))
    new, new_rows = _filled(joining)
    store.append_rows(new, max(40, *joining))
    fresh, _ = _filled([40, *joining])
    assert store.keys.shape == fresh.keys.shape
    for row, states in enumerate([rows[1], *new_rows]):
        assert torch.equal(store.keys[row : row + 1, :, : states.shape[2]], states)
        assert torch.equal(store.values[row : row + 1, :, : states.shape[2]], -states)


@pytest.mark.parametrize("joining", [[30], [25, 60], [30, 20, 10]])
def test_rows_that_join_take_the_place_of_those_that_left(joining):
    """Every row that joins a stream moves all others, which costs more than the pass it joins for."""
    store, rows = _filled([40, 50, 45])
    place = store.keys.data_ptr()
    store.select_rows(torch.tensor([0, 2]))
    store.select_rows(torch.tensor([1]))
    new, new_rows = _filled(joining)
    store.append_rows(new, max(45, *joining))
    for row, states in enumerate([rows[2], *new_rows]):
        assert torch.equal(store.keys[row : row + 1, :, : states.shape[2]], states)
        assert torch.equal(store.values[row : row + 1, :, : states.shape[2]], -states)
    assert (store.keys.data_ptr() == place) == (len(joining) < 3)
    # nothing that was copied stays in memory besides
    assert store._larger is None or store._larger[0].data_ptr() == store.keys.data_ptr()


def test_finished_rows_leave_the_batch():
    """Rows that are done go on costing the target."""
    target = tiny_target("llama")
    inputs = ragged_prompts(4)
    plain = target.generate(**inputs, max_new_tokens=15, do_sample=False)
    width = inputs["input_ids"].shape[1]
    eos = int(plain[2, width + 4])
    sizes = []
    hook = target.model.layers[0].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": eos}
    assisted = target.generate(**inputs, **options, assistant_model=drafter)
    hook.remove()
    assert torch.equal(assisted, target.generate(**inputs, **options))
    assert sizes[0] == 4
    assert min(sizes) < 4
