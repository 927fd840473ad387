"""From a request's fields to what `generate` is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark_hf.serving.errors import ApiError
from dspark_hf.serving.processors import CountPenalties, LogprobRecorder, TokenBias
from dspark_hf.serving.schemas import GenerationBody


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 is greedy.
        top_p: share of probability that is sampled from.
        top_k: number of tokens that are sampled from; 0: all.
        min_p: least probability that is sampled, as a share of the greatest.
        seed: what alone decides the text, or None.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None

    @classmethod
    def read(cls, body: GenerationBody, config: GenerationConfig) -> Sampling:
        """Return what a request asks for, and where it says nothing what the target's configuration does.

        Where that says nothing either, it is the API's: temperature 1, of all tokens.
        """

        def choose(name: str, default: Any) -> Any:
            asked, own = getattr(body, name), getattr(config, name, None)
            return asked if asked is not None else own if own is not None else default

        return cls(
            temperature=choose("temperature", 1.0),
            top_p=choose("top_p", 1.0),
            # -1 is all for some clients, 0 for others
            top_k=max(choose("top_k", 0), 0),
            min_p=choose("min_p", 0.0),
            seed=body.seed,
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.temperature == 0

    def processors(self) -> list[LogitsProcessor]:
        """Return what shapes the distribution, in the order of `generate`."""
        if self.is_greedy:
            return []
        chain: list[LogitsProcessor] = []
        if self.temperature != 1:
            chain.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chain.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p > 0:
            chain.append(MinPLogitsWarper(float(self.min_p)))
        return chain


def read_options(
    body: GenerationBody,
    config: GenerationConfig,
    *,
    prompt_length: int,
    max_new_tokens: int,
    end_ids: list[int],
    recorder: LogprobRecorder | None,
    vocab_size: int,
) -> dict[str, Any]:
    """Return the options of a request to the stream.

    Raises:
        ApiError: if a token that is to be biased is none of the target's.
    """
    sampling = Sampling.read(body, config)
    # first, so that probabilities are the target's own
    chain: list[LogitsProcessor] = [] if recorder is None else [recorder]
    if body.logit_bias:
        biases = {int(token_id): value for token_id, value in body.logit_bias.items()}
        if max(biases) >= vocab_size:
            message = f"`logit_bias` must name tokens in [0, {vocab_size - 1}], got {max(biases)}. Correct it."
            raise ApiError(400, message, param="logit_bias")
        chain.append(TokenBias(biases))
    if body.presence_penalty or body.frequency_penalty:
        chain.append(CountPenalties(prompt_length, body.presence_penalty, body.frequency_penalty))
    chain += sampling.processors()
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": not sampling.is_greedy,
        "logits_processor": LogitsProcessorList(chain),
    }
    if options["do_sample"]:
        # the chain has them
        options |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        if getattr(config, "min_p", None) is not None:
            options["min_p"] = 0.0
        if sampling.seed is not None:
            # a text that the seed alone decides, whoever shares the batch
            options |= {"sampling": "invariant", "seed": sampling.seed % 2**64}
    if end_ids:
        options["eos_token_id"] = end_ids
    return options
