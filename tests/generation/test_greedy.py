"""Greedy decoding with a drafter writes, token for token, what plain `generate` writes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import DynamicCache

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.compat import CACHE_KEY
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.thinning import slow
from tests.tiny import FAMILIES, SLIDING_FAMILIES, VOCAB_SIZE, tiny_target

NEW_TOKENS = 14
# Gemma 2 has no sdpa: its attention is soft-capped
PAIRS = [(family, attention) for family in FAMILIES for attention in ("eager", "sdpa") if family != "gemma2"]
PAIRS.append(("gemma2", "eager"))
# every family once, and one without sliding layers and one with them also as a single row or with the other attention
QUICK = {(family, attention, 4) for family, attention in PAIRS if attention == "sdpa" or family == "gemma2"}
QUICK |= {("llama", "eager", 4), ("gemma3_text", "eager", 1), ("llama", "sdpa", 1)}
QUICK -= {("llama", "sdpa", 4)}
CASES = [
    case if case in QUICK else slow(*case) for case in ((*pair, num_rows) for pair in PAIRS for num_rows in (1, 4))
]


def _drafter(kind, target, plain, inputs):
    if kind == "untrained":
        return DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=5)
    accuracy = {"right": 1.0, "wrong": 0.0, "often right": 0.7}[kind]
    return ScriptedDrafter(target, plain, num_padded(inputs), accuracy)


@pytest.mark.parametrize(("family", "attention", "num_rows"), CASES)
def test_output_is_token_identical(family, attention, num_rows):
    """A drafter changes the text of a family of targets."""
    target = tiny_target(family, attn_implementation=attention)
    inputs = ragged_prompts(num_rows)
    plain = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    # how a round ends does not depend on the family: one without and one with sliding layers see all of it
    kinds = ("untrained", "right", "wrong", "often right") if family in ("llama", "gemma3_text") else ("often right",)
    for kind in kinds:
        drafter = _drafter(kind, target, plain, inputs)
        assisted = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=drafter)
        assert torch.equal(assisted, plain), kind
        statistics = drafter.last_statistics
        # the prefill commits one token, the rounds the rest
        assert statistics.num_committed == num_rows * (NEW_TOKENS - 1)
        if kind == "right":
            assert statistics.num_accepted == statistics.num_verified
            assert statistics.num_target_passes == 1 + -(-(NEW_TOKENS - 1) // 6)
        if kind == "wrong":
            assert statistics.num_accepted == 0
            assert statistics.num_target_passes == NEW_TOKENS


@pytest.mark.parametrize(
    ("family", "num_rows"),
    [
        (pytest.param if case in (("mistral", 1), ("gemma3_text", 3)) else slow)(*case)
        for case in product(SLIDING_FAMILIES, (1, 3))
    ],
)
def test_prompts_longer_than_the_window(family, num_rows):
    """Rolling back a sliding-window cache loses or keeps a token too many."""
    target = tiny_target(family)
    inputs = ragged_prompts(num_rows, lengths=(29, 21, 40))
    plain = target.generate(**inputs, max_new_tokens=24, do_sample=False)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assert torch.equal(target.generate(**inputs, max_new_tokens=24, do_sample=False, assistant_model=drafter), plain)


def test_one_padded_row():
    """A single left-padded row is decoded as if its padding were text."""
    target = tiny_target("llama")
    inputs = {name: tensor[1:2] for name, tensor in ragged_prompts(4).items()}
    plain = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assisted = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=drafter)
    assert torch.equal(assisted, plain)


@pytest.mark.parametrize("num_rows", [1, 4])
def test_custom_generate_door_runs_the_same_loop(num_rows):
    """The door without a patch gives another output than the one with it."""
    target = tiny_target("qwen3")
    inputs = ragged_prompts(num_rows)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    plain = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    through_door = target.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, custom_generate=drafter.decode
    )
    assert torch.equal(through_door, plain)
    assert drafter.last_statistics.num_rounds > 0


@pytest.mark.parametrize("num_rows", [1, 4])
def test_processors_that_look_at_the_prefix(num_rows):
    """A processor sees another prefix than the one plain `generate` shows it."""
    target = tiny_target("llama")
    inputs = ragged_prompts(num_rows)
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5], [7, 9]],
        "prefix_allowed_tokens_fn": lambda row, ids: [t for t in range(2, 64) if (t + row + len(ids)) % 3],
    }
    plain = target.generate(**inputs, **options)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), plain)
    assert drafter.last_statistics.num_accepted > 0


def test_inputs_embeds():
    """A prompt given as embeddings is not continued as plain `generate` continues it."""
    target = tiny_target("llama")
    embeds = target.get_input_embeddings()(ragged_prompts(1)["input_ids"])
    plain = target.generate(inputs_embeds=embeds, max_new_tokens=NEW_TOKENS, do_sample=False)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    assisted = target.generate(
        inputs_embeds=embeds, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=drafter
    )
    assert torch.equal(assisted, plain)


@pytest.mark.parametrize("knows_tokens", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom"])
def test_inputs_embeds_of_several_rows(family, knows_tokens):
    """Rows given as embeddings, with their tokens or without, are continued otherwise than by plain `generate`."""
    target, inputs = tiny_target(family), ragged_prompts(4)
    embeds = target.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    given |= {"input_ids": inputs["input_ids"]} if knows_tokens else {}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**given, **options)
    # embeddings of no tokens, as of a soft prompt, write another text
    assert not torch.equal(target.generate(**{**given, "inputs_embeds": -embeds}, **options), plain)
    whole = plain if knows_tokens else torch.cat([inputs["input_ids"], plain], dim=1)
    drafter = ScriptedDrafter(target, whole, num_padded(inputs), 0.7)
    assert torch.equal(target.generate(**given, **options, assistant_model=drafter), plain)
    assert drafter.last_statistics.num_accepted > 0
    # the next turn goes on from the cache
    ends = {"eos_token_id": plain[0, [-3]].tolist()}
    caches = [DynamicCache(config=target.config) for _ in range(2)]
    first = [
        target.generate(**given, **options, **ends, **{CACHE_KEY: cache}, **assisted)
        for cache, assisted in zip(caches, ({}, {"assistant_model": drafter}), strict=True)
    ]
    assert torch.equal(*first)
    for plain_layer, layer in zip(*(cache.layers for cache in caches), strict=True):
        assert plain_layer.keys.shape == layer.keys.shape


@pytest.mark.parametrize("num_rows", [1, 3])
def test_inputs_embeds_in_a_static_cache(num_rows):
    """A static cache takes a prompt of embeddings for one of as many columns as it has room for."""
    target, inputs = tiny_target("gemma3_text"), ragged_prompts(num_rows)
    given = {"inputs_embeds": target.get_input_embeddings()(inputs["input_ids"])}
    given["attention_mask"] = inputs["attention_mask"]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "cache_implementation": "static"}
    options["disable_compile"] = True
    plain = target.generate(**given, **options)
    drafter = ScriptedDrafter(target, torch.cat([inputs["input_ids"], plain], dim=1), num_padded(inputs), 0.7)
    assert torch.equal(target.generate(**given, **options, assistant_model=drafter), plain)


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("llama", {"prefill_chunk_size": 4}, "`prefill_chunk_size` must be None"),
        ("lfm2", {}, r"got \['inputs_embeds'\]"),
        ("llama", {"position_ids": torch.arange(17).expand(3, -1) + 1}, "`position_ids` must count"),
    ],
)
def test_inputs_embeds_that_cannot_be_followed(family, more, message):
    """Embeddings beside what is not known to go with them change the text."""
    kinds = {"layer_types": ["conv", "full_attention"]} if family == "lfm2" else {}
    target, inputs = tiny_target(family, **kinds), ragged_prompts(3)
    embeds = target.get_input_embeddings()(inputs["input_ids"])
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    with pytest.raises(ValueError, match=message):
        target.generate(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=4,
            assistant_model=drafter,
            **more,
        )


def test_reduced_draft_vocabulary():
    """A drafter that cannot propose every token changes the text."""
    target = tiny_target("llama")
    inputs = ragged_prompts(4)
    plain = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    drafter = DSparkAssistantModel.from_target(
        target, num_hidden_layers=1, markov_rank=8, draft_token_ids=range(0, 64, 3)
    )
    assisted = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=drafter)
    assert torch.equal(assisted, plain)


@pytest.mark.parametrize("num_rows", [1, 4])
def test_ends_outside_the_vocabulary(num_rows):
    """An end that the target cannot write, as of a tokenizer with more tokens, breaks off the call."""
    target = tiny_target("llama")
    inputs = ragged_prompts(num_rows)
    plain = target.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    ends = [VOCAB_SIZE + 9, int(plain[0, -4])]
    for eos_token_id in (ends[0], ends):
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": eos_token_id, "pad_token_id": 0}
        plain = target.generate(**inputs, **options)
        drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
        assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), plain)
