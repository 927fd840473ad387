"""`sampling="invariant"`: a seed decides the text, whoever drafts it and however far.

n samples, V vocab.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from struct import pack, unpack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from dspark_hf import LookupAssistant, Request, generate_stream
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.noise import KeyedNoise
from tests.generation.frequencies import (
    PROMPT,
    small_target,
    smallest_p_value,
    untrained_drafter,
)
from tests.reference.sampling import SMALLEST_P_VALUE, p_value, text_probabilities
from tests.thinning import slow
from tests.tiny import tiny_target

SEED = 5
NUM_SAMPLES = 2000
NEW_TOKENS = 5


class Noise(LogitsProcessor):
    """Add the noise of each row's place, token by token."""

    def __init__(self, prompt_length: int):
        torch.manual_seed(SEED)
        self.noise = KeyedNoise()
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows, place = range(len(input_ids)), input_ids.shape[1] - self.prompt_length
        return self.noise.add_to(scores[:, None], list(rows), [place] * len(input_ids))[:, 0]


def _prompts() -> dict[str, Tensor]:
    ids = torch.tensor([[7, 9, 7, 9, 11], [0, 0, 5, 6, 8], [4, 4, 4, 3, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    return {"input_ids": ids, "attention_mask": mask}


def _write(target: PreTrainedModel, drafter: Drafter, **options: Any) -> Tensor:
    torch.manual_seed(SEED)
    options = {"max_new_tokens": 16, "do_sample": True, "top_k": 0, "sampling": "invariant", **options}
    return target.generate(**{**_prompts(), **options}, assistant_model=drafter)


WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "fixed": {"scheduler": "fixed", "drafts": "model"},
    "one draft": {"scheduler": "fixed", "num_assistant_tokens": 1},
    "threshold": {"assistant_confidence_threshold": 0.5},
    "looked up": {"drafts": "lookup"},
}


@pytest.mark.parametrize(
    "warper", [slow({}), slow({"top_k": 7, "temperature": 1.4}), {"repetition_penalty": 1.3, "top_p": 0.9}]
)
def test_a_seed_decides_the_text(warper: dict[str, Any]) -> None:
    """The same seed gives another text with another drafter, schedule or number of drafts."""
    target = tiny_target("llama")
    # greedy, with noise behind the warpers: what the drafted texts must be, token by token
    warpers = target._get_logits_processor(GenerationConfig(do_sample=True, **{"top_k": 0, **warper}))
    # a penalty counts in greedy decoding, too
    chain = LogitsProcessorList([*warpers, Noise(5)])
    plain = target.generate(**_prompts(), max_new_tokens=16, do_sample=False, logits_processor=chain)
    assert not torch.equal(plain, target.generate(**_prompts(), max_new_tokens=16, do_sample=False))
    drafter, other = untrained_drafter(target), untrained_drafter(target, draft_token_ids=list(range(3, 40)))
    for name, knobs in WAYS.items():
        assert torch.equal(_write(target, drafter, **warper, **knobs), plain), name
    assert torch.equal(_write(target, other, **warper), plain)
    assert torch.equal(_write(target, LookupAssistant(), **warper), plain)


def test_the_usual_rule_does_not() -> None:
    """The texts of the test above would be the same under any rule."""
    target = tiny_target("llama")
    drafter = untrained_drafter(target)
    texts = [_write(target, drafter, sampling="block", **WAYS[name]) for name in ("fixed", "one draft")]
    assert not torch.equal(*texts)


def test_rows_and_seeds_differ() -> None:
    """Rows with the same prompt get the same text, or one seed the text of another."""
    target = tiny_target("llama")
    drafter = untrained_drafter(target)
    one, other = _write(target, drafter, **{**_prompts(), "input_ids": torch.full((2, 5), 7), "attention_mask": None})
    assert not torch.equal(one, other)
    first, second = (
        target.generate(
            torch.full((1, 5), 7), max_new_tokens=16, do_sample=True, sampling="invariant", assistant_model=drafter
        )
        for _ in range(2)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("drafts", [slow("model"), "lookup"])
def test_the_text_follows_the_target(drafts: str) -> None:
    """Sampled text is not the target's under the invariant rule."""
    target = small_target()
    drafter = untrained_drafter(target)
    samples = target.generate(
        PROMPT.expand(NUM_SAMPLES, -1),
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        sampling="invariant",
        drafts=drafts,
        assistant_model=drafter,
    )[:, len(PROMPT) :]
    statistics = drafter.last_statistics
    assert statistics is not None and 0.1 < statistics.num_accepted / statistics.num_verified < 0.95
    assert smallest_p_value(samples, text_probabilities(target, PROMPT, NEW_TOKENS)) > SMALLEST_P_VALUE


def test_steps_write_the_same_text() -> None:
    """A processor that may remember its calls gets other noise than one that does not."""
    target = tiny_target("llama")
    drafter = untrained_drafter(target)
    texts = [
        _write(
            target,
            drafter,
            logits_processor=LogitsProcessorList([kind()]),
            input_ids=torch.tensor([[5, 6, 7]]),
            attention_mask=None,
        )
        for kind in (_Bias, _RememberedBias)
    ]
    assert torch.equal(*texts)


class _Bias(LogitsProcessor):
    depends_on_prefix_alone = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.sin(input_ids.sum(-1, keepdim=True) + torch.arange(scores.shape[1]))


class _RememberedBias(_Bias):
    depends_on_prefix_alone = False


def test_requests_of_a_stream_write_the_same_text() -> None:
    """A request's text depends on who shares its passes, or on how far is drafted for them."""
    target = tiny_target("llama")
    drafter = untrained_drafter(target)
    options = {"max_new_tokens": 12, "do_sample": True, "sampling": "invariant"}
    prompts = [[5, 6, 7], [8, 9], [3, 3, 3, 4]]

    def texts(**how: Any) -> dict[int, list[int]]:
        torch.manual_seed(SEED)
        requests = [Request(prompt, dict(options), key=i) for i, prompt in enumerate(prompts)]
        finished = list(generate_stream(target, requests, drafter=drafter, **how))
        assert all(one.error is None for one in finished), [one.error for one in finished]
        return {one.request.key: one.token_ids.tolist() for one in finished}

    together = texts(scheduler="fixed")
    assert texts(scheduler="threshold") == together
    assert texts(max_rows=1, scheduler="fixed", drafts="lookup") == together
    torch.manual_seed(SEED)
    alone = target.generate(torch.tensor([prompts[0]]), assistant_model=drafter, scheduler="fixed", **options)
    assert together[0] == alone[0].tolist()


def test_scores_are_shown_without_noise() -> None:
    """`output_scores` shows a user the noise."""
    target = tiny_target("llama")
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
    output: Any = _write(
        target, untrained_drafter(target), input_ids=torch.tensor([[5, 6, 7]]), attention_mask=None, **options
    )
    logits = target(output.sequences[:, :-1]).logits[0, 2:]
    torch.testing.assert_close(torch.cat(output.scores), logits, atol=1e-4, rtol=1e-4)


def _slow_gumbel(seed: int, row: int, place: int, token: int) -> float:
    """Return one token's noise by whole numbers of Python, as a 32-bit machine has them."""
    first, second = unpack("<II", blake2b(pack("<Qqq", seed, row, place), digest_size=8).digest())
    bits = (token * 0x9E3779B1 + first) % 2**32
    bits = (bits ^ bits >> 16) * 0xA812D533 % 2**32
    bits = (bits + second) % 2**32
    bits = (bits ^ bits >> 15) * 0xC2B2AE35 % 2**32
    bits = (bits ^ bits >> 16) % 2**31
    return -math.log(-math.log1p(-(bits + 0.5) / 2**31))


def test_noise_is_that_of_whole_numbers() -> None:
    """Noise depends on how a device shifts and multiplies signed integers."""
    seed, rows, starts = 2**62 + 3, [4, 0], [10, 2**20]
    noise = KeyedNoise(seed).add_to(torch.zeros(2, 3, 50), rows, starts)
    slow = [
        [[_slow_gumbel(seed, row, start + w, t) for t in range(50)] for w in range(3)]
        for row, start in zip(rows, starts, strict=True)
    ]
    torch.testing.assert_close(noise, torch.tensor(slow), atol=1e-5, rtol=1e-5)
    chosen = torch.tensor([[3, 49], [7, 0]])
    some = KeyedNoise(seed).add_to(torch.zeros(2, 3, 2), rows, starts, chosen)
    assert torch.equal(some, noise.gather(-1, chosen[:, None].expand(-1, 3, -1)))


def test_places_are_independent() -> None:
    """What is drawn at a place tells something of the next place, row or seed."""
    size, count = 5, 20_000
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.0999, 0.0001], dtype=torch.float64)
    scores = probabilities.log().float().expand(1, count, size)
    joint = probabilities[:, None] * probabilities
    drawn = KeyedNoise(1).add_to(scores, [0], [0]).argmax(-1)[0]
    row = KeyedNoise(1).add_to(scores, [1], [0]).argmax(-1)[0]
    seed = KeyedNoise(2).add_to(scores, [0], [0]).argmax(-1)[0]
    for other in (drawn.roll(1), row, seed):
        assert p_value(torch.stack([drawn, other], dim=1), joint) > SMALLEST_P_VALUE
    # the negative control: the same place twice
    assert p_value(torch.stack([drawn, drawn], dim=1), joint) < SMALLEST_P_VALUE


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """Noise of few bits never draws the rare tokens of a large vocabulary, or too often."""
    size, count = 2**14, 2**10
    scores = torch.zeros(1, count, size)
    scores[..., 0] = math.log(size)
    # half the draws are spread over 16,384 tokens: their ids by sixteenths
    drawn = KeyedNoise(3).add_to(scores, [0], [0]).argmax(-1)[0]
    cells = torch.where(drawn == 0, 0, 1 + drawn * 16 // size)
    tail = torch.full((16,), 1 / 32, dtype=torch.float64)
    expected = torch.cat([torch.tensor([0.5], dtype=torch.float64), tail])
    expected = expected / expected.sum()
    assert p_value(cells[:, None], expected) > SMALLEST_P_VALUE


@pytest.mark.parametrize(("value", "message"), [("gumbel", "must be one of block, invariant"), (3, "must be one of")])
def test_an_unknown_rule_is_refused(value: Any, message: str) -> None:
    """A misspelt rule of sampling is taken for the usual one."""
    target = tiny_target("llama")
    with pytest.raises(ValueError, match=f"`sampling` {message}"):
        _write(target, untrained_drafter(target), sampling=value)


def test_the_rule_needs_a_drafter() -> None:
    """Plain `generate` takes the rule and ignores it."""
    with pytest.raises(ValueError, match="`sampling` must be left out unless"):
        tiny_target("llama").generate(torch.tensor([[5, 6]]), do_sample=True, sampling="invariant")


def test_the_rule_may_stand_in_a_configuration() -> None:
    """The rule in a configuration is ignored."""
    target = tiny_target("llama")
    drafter = untrained_drafter(target)
    by_call = _write(target, drafter)
    config = GenerationConfig(max_new_tokens=16, do_sample=True, top_k=0, sampling="invariant")
    torch.manual_seed(SEED)
    assert torch.equal(target.generate(**_prompts(), generation_config=config, assistant_model=drafter), by_call)
