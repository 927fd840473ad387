"""Sampled text follows the target's distribution: frequencies against an exact enumeration of a tiny target.

B batch, n samples, S prompt length, V vocab.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark_hf.generation.drafting.interface import DraftedBlock, Drafter
from tests.generation.altered import AlteredDrafter
from tests.generation.drafters import MemorylessDrafter
from tests.generation.frequencies import (
    BLOCK_SIZE,
    PROMPT,
    VOCAB_SIZE,
    PrefixDependent,
    small_target,
    smallest_p_value,
    untrained_drafter,
)
from tests.reference.sampling import SMALLEST_P_VALUE, text_probabilities
from tests.thinning import mostly_slow, slow

NUM_SAMPLES = 2000
NUM_SINGLE_ROW_SAMPLES = 80
NEW_TOKENS = 5
EOS = 3


# what `generate` is told, and what it makes of that
OPTIONS: dict[str, tuple[dict[str, Any], list[LogitsProcessor]]] = {
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "top-k": ({"top_k": 3}, [TopKLogitsWarper(3)]),
    "top-p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "min-p": ({"min_p": 0.15}, [MinPLogitsWarper(0.15)]),
    "repetition penalty": ({"repetition_penalty": 1.8}, [RepetitionPenaltyLogitsProcessor(1.8)]),
    "prefix-dependent": ({"logits_processor": LogitsProcessorList([PrefixDependent()])}, [PrefixDependent()]),
    "mixture": (
        {
            "repetition_penalty": 1.5,
            "logits_processor": LogitsProcessorList([PrefixDependent()]),
            "temperature": 1.3,
            "top_p": 0.9,
        },
        [
            RepetitionPenaltyLogitsProcessor(1.5),
            PrefixDependent(),
            TemperatureLogitsWarper(1.3),
            TopPLogitsWarper(0.9),
        ],
    ),
    "one draft per round": ({"num_assistant_tokens": 1}, []),
    "confidence threshold": ({"assistant_confidence_threshold": 0.5}, []),
    "end of text": ({"eos_token_id": EOS}, []),
}
FIELDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "no Markov head": {"markov_rank": 0},
    "no confidence head": {"enable_confidence_head": False},
    "reduced vocabulary": {"draft_token_ids": [0, 1, 3, 5]},
    "reduced vocabulary, rnn": {"draft_token_ids": [1, 2, 4], "markov_head_type": "rnn"},
}
# some options again with the drafter that leaves most of the vocabulary to the target
_REDUCED_CASES = ("top-k", "repetition penalty", "mixture", "confidence threshold", "end of text")
_SLOW_REDUCED_CASES = ("top-k", "repetition penalty", "confidence threshold")
# a mixture is tried with the other drafter, and reaches the drafts the way each option does that it holds
_QUICK_CASES = ("one draft per round", "confidence threshold")
OPTION_CASES = [(pytest.param if name in _QUICK_CASES else slow)(name, "vanilla") for name in OPTIONS] + [
    (slow if name in _SLOW_REDUCED_CASES else pytest.param)(name, "reduced vocabulary, rnn") for name in _REDUCED_CASES
]


def _memoryless_target() -> PreTrainedModel:
    """Return a target whose next token depends on the last one alone."""
    target = small_target()
    with torch.no_grad():
        target.model.layers[0].self_attn.o_proj.weight.zero_()
    return target


def _sample(target: PreTrainedModel, drafter: Drafter | None, **options: Any) -> Tensor:
    """Return what `generate` writes after `NUM_SAMPLES` copies of the prompt, `(n, NEW_TOKENS)`."""
    prompts = PROMPT.expand(NUM_SAMPLES, -1)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, **options}
    return target.generate(prompts, assistant_model=drafter, **options)[:, len(PROMPT) :]


def _assert_some_drafts_are_rejected(drafter: Drafter) -> None:
    # else the frequencies say nothing about drafting or nothing about rejecting
    statistics = drafter.last_statistics
    assert statistics is not None
    assert 0.1 < statistics.num_accepted / statistics.num_verified < 0.9


@pytest.mark.parametrize("name", mostly_slow(["none", *OPTIONS], ("mixture", "min-p", "end of text")))
def test_enumeration_describes_plain_generate(name):
    """The reference distribution of this file is not the one that plain `generate` samples from."""
    options, processors = OPTIONS.get(name, ({}, []))
    target = small_target()
    target.generation_config.eos_token_id = options.get("eos_token_id")
    knobs = ("num_assistant_tokens", "assistant_confidence_threshold")
    samples = _sample(target, None, **{key: value for key, value in options.items() if key not in knobs})
    probabilities = text_probabilities(target, PROMPT, NEW_TOKENS, processors=LogitsProcessorList(processors))
    assert smallest_p_value(samples, probabilities) > SMALLEST_P_VALUE


@pytest.mark.parametrize("kind", mostly_slow(FIELDS, ("no Markov head",)))
def test_every_kind_of_drafter_keeps_the_distribution(kind):
    """Sampled text of a batch is not the target's with some kind of drafter."""
    target = small_target()
    drafter = untrained_drafter(target, **FIELDS[kind])
    samples = _sample(target, drafter)
    _assert_some_drafts_are_rejected(drafter)
    assert smallest_p_value(samples, text_probabilities(target, PROMPT, NEW_TOKENS)) > SMALLEST_P_VALUE


@pytest.mark.parametrize(("name", "kind"), OPTION_CASES)
def test_every_option_keeps_the_distribution(name, kind):
    """Sampled text of a batch is not the target's under some option of `generate`."""
    options, processors = OPTIONS[name]
    target = small_target()
    target.generation_config.eos_token_id = options.get("eos_token_id")
    drafter = untrained_drafter(target, **FIELDS[kind])
    samples = _sample(target, drafter, **options)
    _assert_some_drafts_are_rejected(drafter)
    if "assistant_confidence_threshold" in options:
        assert drafter.last_statistics.num_verified < drafter.last_statistics.num_drafted
    probabilities = text_probabilities(target, PROMPT, NEW_TOKENS, processors=LogitsProcessorList(processors))
    assert smallest_p_value(samples, probabilities) > SMALLEST_P_VALUE


@pytest.mark.slow
def test_rows_of_different_lengths_keep_their_distributions():
    """Sampled text of one row depends on the other prompts of the batch, or on padding."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    prompts = torch.tensor([[2, 3, 4, 5, 1], [0, 0, 4, 2, 2], [0, 0, 0, 0, 5]])
    options, processors = OPTIONS["mixture"]
    target = small_target()
    drafter = untrained_drafter(target)
    copies = NUM_SAMPLES // 4
    outputs = target.generate(
        prompts.repeat(copies, 1),
        attention_mask=mask.repeat(copies, 1),
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        assistant_model=drafter,
        **{**options, "repetition_penalty": None},
    )
    _assert_some_drafts_are_rejected(drafter)
    for row in range(3):
        probabilities = text_probabilities(
            target,
            prompts[row],
            NEW_TOKENS,
            processors=LogitsProcessorList(processors[1:]),
            attention_mask=mask[row],
        )
        samples = outputs[row::3, prompts.shape[1] :]
        assert smallest_p_value(samples, probabilities) > SMALLEST_P_VALUE


@pytest.mark.parametrize("name", ["mixture", slow("confidence threshold")])
def test_single_rows_keep_the_distribution(name):
    """Sampled text of one row, which takes another path than a batch, is not the target's."""
    options, processors = OPTIONS[name]
    target = small_target()
    drafter = untrained_drafter(target)
    new_tokens = 4
    samples = torch.cat(
        [
            target.generate(
                PROMPT[None], max_new_tokens=new_tokens, do_sample=True, assistant_model=drafter, **options
            )
            for _ in range(NUM_SINGLE_ROW_SAMPLES)
        ]
    )[:, len(PROMPT) :]
    probabilities = text_probabilities(target, PROMPT, new_tokens, processors=LogitsProcessorList(processors))
    assert smallest_p_value(samples, probabilities, span=2) > SMALLEST_P_VALUE


def test_uniform_drafter_keeps_the_distribution():
    """A drafter that knows nothing changes what is sampled."""
    target = small_target()
    drafter = MemorylessDrafter(lambda slot, previous: torch.zeros(len(previous), VOCAB_SIZE), VOCAB_SIZE, BLOCK_SIZE)
    samples = _sample(target, drafter)
    _assert_some_drafts_are_rejected(drafter)
    assert smallest_p_value(samples, text_probabilities(target, PROMPT, NEW_TOKENS)) > SMALLEST_P_VALUE


@pytest.mark.parametrize("name", [slow("temperature"), "mixture"])
def test_drafter_equal_to_the_target_is_always_accepted(name):
    """Drafts are sampled under other processors than those of the target: good ones are rejected."""
    options, processors = OPTIONS[name]
    target = _memoryless_target()
    drafter = MemorylessDrafter(
        lambda slot, previous: target(previous[:, None], use_cache=False).logits[:, -1], VOCAB_SIZE, BLOCK_SIZE
    )
    samples = _sample(target, drafter, **options)
    statistics = drafter.last_statistics
    assert statistics.num_accepted == statistics.num_verified > 0
    probabilities = text_probabilities(target, PROMPT, NEW_TOKENS, processors=LogitsProcessorList(processors))
    assert smallest_p_value(samples, probabilities) > SMALLEST_P_VALUE


def _most_likely(block: DraftedBlock) -> DraftedBlock:
    return replace(block, token_ids=block.probs.argmax(-1))


def _sharpened(block: DraftedBlock) -> DraftedBlock:
    return replace(block, probs=(block.probs**1.5) / (block.probs**1.5).sum(-1, keepdim=True))


def _confident_in_its_own_draft(block: DraftedBlock) -> DraftedBlock:
    return replace(block, confidence=block.probs.gather(-1, block.token_ids[..., None]).squeeze(-1))


@pytest.mark.parametrize(
    ("alter", "options"),
    [
        slow(_most_likely, {}),
        slow(_sharpened, {}),
        (_confident_in_its_own_draft, {"assistant_confidence_threshold": 0.3}),
    ],
)
def test_dishonest_drafter_is_found_out(alter, options):
    """The frequency tests of this file would pass for text that does not follow the target's distribution."""
    target = small_target()
    samples = _sample(target, AlteredDrafter(untrained_drafter(target), alter), **options)
    assert smallest_p_value(samples, text_probabilities(target, PROMPT, NEW_TOKENS)) < SMALLEST_P_VALUE
