"""What an error in a round, or Ctrl-C, leaves behind in a cache that the user brought."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.generation import BaseStreamer

from dspark_hf import DeepseekV4DSparkConfig
from dspark_hf.generation.compat import CACHE_KEY
from dspark_hf.modeling.deepseek_v4.cache import DeepseekV4DSparkCache
from tests.generation.drafters import ScriptedDrafter
from tests.generation.prompts import num_padded, ragged_prompts
from tests.generation.schedulers import PlainSteps
from tests.modeling.deepseek_v4.tiny import tiny_model
from tests.recurrent import RECURRENT_FAMILIES, recurrent_target
from tests.thinning import slow
from tests.tiny import tiny_target

NEW_TOKENS = 18
# of the text, prompt included: past the window, some rounds after the prefill
LENGTH = 21
OPTIONS = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}


class Interrupt(BaseException):
    """Stands for Ctrl-C, which is no `Exception` either."""


class Streamer(BaseStreamer):
    """Fail once the text has so many tokens."""

    def __init__(self, length: int):
        self.length = length
        self.num_tokens = 0

    def put(self, value: Tensor) -> None:
        self.num_tokens += value.shape[-1] if value.ndim > 1 else 1
        if self.num_tokens >= self.length:
            raise Interrupt

    def end(self) -> None:
        """Nothing."""


class Processor(LogitsProcessor):
    """Fail once a text has so many tokens."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        if input_ids.shape[1] >= self.length:
            raise Interrupt
        return scores


class Criterion(StoppingCriteria):
    """Fail once a text has so many tokens."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] >= self.length:
            raise Interrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


FAILING: dict[str, Any] = {
    "streamer": lambda length: {"streamer": Streamer(length)},
    "processor": lambda length: {"logits_processor": [Processor(length)]},
    "criterion": lambda length: {"stopping_criteria": [Criterion(length)]},
}


def _target(family: str) -> PreTrainedModel:
    if family in RECURRENT_FAMILIES:
        return recurrent_target(family)
    return tiny_model() if family == "deepseek_v4" else tiny_target(family)


def _empty_cache(target: PreTrainedModel) -> Any:
    config: Any = target.config
    return DeepseekV4DSparkCache(config) if isinstance(config, DeepseekV4DSparkConfig) else DynamicCache(config=config)


def _erring_drafter(target: PreTrainedModel, text: Tensor, padded: list[int], length: int) -> ScriptedDrafter:
    """Return a drafter that is right up to `length` tokens, and wrong from there on."""
    script = text.clone()
    script[:, length:] = (script[:, length:] + 1) % target.config.vocab_size
    return ScriptedDrafter(target, script, padded, 1.0)


def _next_turn(target: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
    options = {} if cache is None else {CACHE_KEY: cache}
    return target.generate(ids, attention_mask=mask, **{**OPTIONS, "max_new_tokens": 6}, **options)


@torch.no_grad()
def _check_cache(target: PreTrainedModel, cache: Any, text: Tensor, inputs: dict[str, Tensor]) -> None:
    """Check that a turn that goes on with the cache is the one that starts anew."""
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
    assert 0 < cache.get_seq_length() < text.shape[1]
    message = torch.arange(2, 14).expand(len(text), -1)
    ids = torch.cat([text, message], dim=1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    assert torch.equal(_next_turn(target, ids, mask, cache), _next_turn(target, ids, mask))


# every failure and every kind of cache; a pass of DeepSeek-V4 takes long: its cache sees every failure once in all
@pytest.mark.parametrize(
    ("family", "num_rows", "what"),
    [("llama", 1, what) for what in FAILING]
    + [("gemma3_text", 1, "criterion"), ("bamba", 1, "processor"), slow("qwen3_5_text", 1, "criterion")]
    + [slow("gemma3_text", 1, what) for what in ("streamer", "processor")]
    + [slow("gemma4_text", 1, what) for what in FAILING]
    + [slow("deepseek_v4", 1, "streamer"), ("deepseek_v4", 3, "processor"), slow("deepseek_v4", 3, "criterion")],
)
def test_no_rejected_drafts_stay(family, num_rows, what):
    """After an error of the user's own code, the next turn with the same cache reads drafts that were rejected."""
    target, inputs = _target(family), ragged_prompts(num_rows)
    plain = target.generate(**inputs, **OPTIONS)
    # in the first round, and once the text is longer than the window; a pass of DeepSeek-V4 takes long
    for length in (LENGTH,) if family == "deepseek_v4" else (inputs["input_ids"].shape[1] + 1, LENGTH + 2):
        drafter = _erring_drafter(target, plain, num_padded(inputs), length)
        cache = _empty_cache(target)
        with pytest.raises(Interrupt):
            target.generate(
                **inputs, **OPTIONS, **FAILING[what](length), assistant_model=drafter, **{CACHE_KEY: cache}
            )
        _check_cache(target, cache, plain[:, :length], inputs)


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [(family, None) for family in ("llama", "gemma3_text", "deepseek_v4", "bamba")]
    + [slow(family, None) for family in ("gemma4_text", "falcon_h1")]
    + [slow("llama", PlainSteps()), ("gemma3_text", PlainSteps()), slow("qwen3_5_text", PlainSteps())],
)
def test_a_pass_that_ends_early_leaves_nothing(family, scheduler):
    """After Ctrl-C within a pass, of one token or of many, some layers hold more than others."""
    target, inputs = _target(family), ragged_prompts(1)
    plain = target.generate(**inputs, **OPTIONS)
    drafter = _erring_drafter(target, plain, num_padded(inputs), LENGTH)
    cache = _empty_cache(target)
    num_passes = 0

    def interrupt(module, args):
        nonlocal num_passes
        num_passes += 1
        if num_passes == 4:
            raise Interrupt

    with target.get_decoder().layers[1].register_forward_pre_hook(interrupt), pytest.raises(Interrupt):
        target.generate(**inputs, **OPTIONS, assistant_model=drafter, scheduler=scheduler, **{CACHE_KEY: cache})
    _check_cache(target, cache, plain[:, : LENGTH + 8], inputs)


def test_a_cache_given_back_does_not_record():
    """A cache that went through a call grows without bound in calls without a drafter."""
    target, inputs = tiny_target("gemma3_text"), ragged_prompts(1)
    plain = target.generate(**inputs, **OPTIONS)
    drafter = ScriptedDrafter(target, plain, [0], 0.7)
    cache = _empty_cache(target)
    text = target.generate(**inputs, **OPTIONS, assistant_model=drafter, **{CACHE_KEY: cache})
    assert torch.equal(text, plain)
    _check_cache(target, cache, text, inputs)
