"""Rotary embeddings that go by the longest text of a pass: exact where no pass reaches their switch, else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.generation.requests.request import Request
from dspark_hf.generation.requests.stream import generate_stream
from tests.generation.drafters import BLOCK_SIZE, ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.thinning import mostly_slow, slow
from tests.tiny import tiny_target

SWITCH = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("llama", {"rope_parameters": LONGROPE}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH}),
    "phi3": (
        "phi3",
        {
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 1.0},
            "original_max_position_embeddings": SWITCH,
        },
    ),
    "per layer": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": LONGROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
}
REFUSED = rf"`max_new_tokens` must keep text and drafts within {SWITCH} tokens"


def _target(kind):
    family, options = KINDS[kind]
    return tiny_target(family, seed=2, **options)


@pytest.mark.parametrize(
    ("kind", "num_rows"),
    [
        (pytest.param if (num_rows == 1) == (kind in ("longrope", "per layer")) else slow)(kind, num_rows)
        for kind in KINDS
        for num_rows in (1, 3)
    ],
)
def test_texts_up_to_the_switch(kind, num_rows):
    """A drafter changes the text of a target whose rotary embedding switches later, or is refused for nothing."""
    target = _target(kind)
    inputs = ragged_prompts(num_rows, lengths=(9, 4, 6))
    options = {"max_new_tokens": SWITCH - BLOCK_SIZE - 9, "do_sample": False}
    plain = target.generate(**inputs, **options)
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), plain)
    options["max_new_tokens"] += 1
    with pytest.raises(ValueError, match=REFUSED):
        target.generate(**inputs, **options, assistant_model=drafter)


@pytest.mark.parametrize(
    ("lengths", "kind"),
    [
        (pytest.param if (len(lengths) == 1) == (kind == "phi3") else slow)(lengths, kind)
        for lengths in ((SWITCH + 1,), (SWITCH + 1, 50, 40))
        for kind in ("longrope", "phi3", "per layer")
    ],
)
def test_prompts_beyond_the_switch(lengths, kind):
    """A long prompt, after which the embedding stays as it is, is refused or not continued as without a drafter."""
    target = _target(kind)
    inputs = ragged_prompts(len(lengths), lengths=lengths)
    try:
        plain = target.generate(**inputs, max_new_tokens=20, do_sample=False)
    except UnboundLocalError:
        pytest.skip("transformers 5.17 cannot decode embeddings that switch layer by layer")
    drafter = ScriptedDrafter(target, plain, num_padded(inputs), 0.7)
    assert torch.equal(target.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_model=drafter), plain)
    assert drafter.last_statistics.num_accepted > 0


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [("longrope", (SWITCH,)), ("longrope", (50, SWITCH, 40)), ("dynamic", (50,)), ("dynamic", (50, 40))],
)
def test_prompts_on_both_sides_of_the_switch(kind, lengths):
    """Rows before the switch and rows beyond it change each other's text."""
    target = _target(kind)
    drafter = ScriptedDrafter(target, torch.zeros(len(lengths), 1, dtype=torch.long), [0] * len(lengths), 1.0)
    with pytest.raises(ValueError, match=REFUSED):
        target.generate(**ragged_prompts(len(lengths), lengths=lengths), max_new_tokens=4, assistant_model=drafter)


@pytest.mark.parametrize("kind", mostly_slow(KINDS, ("dynamic", "phi3")))
def test_requests(kind):
    """A request that reaches the switch changes the text of the others, or is not told apart from them."""
    target = _target(kind)
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=5)
    # a fresh drafter of such a target has such an embedding too: only drafts depend on it
    sizes = {"short": (4, 12), "longer": (9, SWITCH - 5 - 9), "too long": (9, SWITCH - 5 - 9 + 1), "beyond": (50, 8)}
    options = {"do_sample": False}
    requests = [
        Request(torch.arange(2, 2 + size), {**options, "max_new_tokens": count}, key)
        for key, (size, count) in sizes.items()
    ]
    for one in generate_stream(target, requests, drafter=drafter, scheduler="fixed"):
        if one.request.key in ("short", "longer"):
            assert one.error is None
            assert torch.equal(one.token_ids, target.generate(one.request.input_ids[None], **one.request.options)[0])
        else:
            assert "must keep text and drafts within" in str(one.error)


@pytest.mark.parametrize("past_length", [0, 20])
def test_caches_that_phi3_computes_anew(past_length):
    """What Phi-3 drops the cache for, a prompt beyond its first length, is forgotten after the first pass."""
    target = tiny_target("phi3", original_max_position_embeddings=SWITCH)
    inputs = ragged_prompts(1, lengths=(SWITCH + 8,))
    texts = []
    for assistant in (None, DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)):
        options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
        if past_length:
            options[CACHE_KEY] = DynamicCache(config=target.config)
            target(inputs["input_ids"][:, :past_length], **{CACHE_KEY: options[CACHE_KEY]})
        if assistant is not None and past_length and Version(transformers.__version__) < Version("5.24"):
            # plain reads a part of the prompt only, and calls it the whole
            with pytest.raises(ValueError, match="must be left out here when a drafter assists"):
                target.generate(**inputs, **options, assistant_model=assistant)
            return
        texts.append(target.generate(**inputs, **options, assistant_model=assistant))
    assert torch.equal(*texts)
