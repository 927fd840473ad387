"""Let the target write: answers to prompts, or what continues a text.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dspark_hf.generation.compat import CACHE_KEY, empty_cache_like, is_placeholder_layer, is_stateful
from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.targets.adapter import input_device
from dspark_hf.prompts import Prompt, encode_prompt, end_token_id, has_chat_template

SEGMENT_LENGTH = 64

# tokens of the prompt that are decoded with an answer, and taken off again
_CONTEXT_LENGTH = 4

# what of a generation config counts from the start of a call, which a later segment would move
_COUNTS_FROM_START = (
    "min_new_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "max_time",
    "cache_implementation",
    "guidance_scale",
    "watermarking_config",
)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 is greedy.
        top_p: share of the probability that is sampled from.

    Raises:
        ValueError: if a field breaks its rule.

    Example:

        >>> str(Sampling.parse("0.7,0.95")), str(Sampling.parse("1")), str(Sampling.parse("greedy"))
        ('0.7,0.95', '1.0', 'greedy')
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"`temperature` must be finite and not negative, got {self.temperature}. Use 0 for greedy decoding."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], got {self.top_p}. Use 1 to sample from all tokens.")

    @classmethod
    def parse(cls, text: str) -> Sampling:
        """Return the setting that `text` names: `greedy`, `TEMPERATURE` or `TEMPERATURE,TOP_P`."""
        if text.strip() == "greedy":
            return cls()
        try:
            numbers = [float(number) for number in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2):
            raise ValueError(
                f"`sampling` must be greedy, TEMPERATURE or TEMPERATURE,TOP_P, got {text!r}. Write for example "
                "0.7,0.95."
            )
        return cls(*numbers)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature == 0

    def __str__(self) -> str:
        if self.is_greedy:
            return "greedy"
        return f"{self.temperature}" if self.top_p == 1 else f"{self.temperature},{self.top_p}"


DEFAULT_SAMPLINGS = (Sampling(), Sampling(0.7, 0.95), Sampling(1.0))


@dataclass(frozen=True)
class Answer:
    """What was written.

    Args:
        text: the text, without special tokens.
        is_finished: whether it ended by itself; otherwise it was cut at the length limit.
        num_tokens: its length, the token that ends it included.
        token_ids: its very tokens, the one that ends it included; None if the writer does not know them.
    """

    text: str
    is_finished: bool
    num_tokens: int
    token_ids: tuple[int, ...] | None = None


class Writer(Protocol):
    """Something that writes in the target's words: the loaded target, or a server of it."""

    batch_size: int
    """How many prompts to give at once."""

    def write(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, max_new_tokens: int, seed: int, stop: str = ""
    ) -> Iterator[tuple[int, Answer]]:
        """Yield each prompt's index and what follows it, as it becomes ready.

        Args:
            prompts: what to answer or to continue.
            sampling: how tokens are chosen.
            max_new_tokens: longest answer.
            seed: the same seed writes the same, where the writer can.
            stop: text that ends an answer too; it is no part of it.
        """
        ...


class LocalWriter:
    """A target, loaded here, that writes in batches.

    Rows of a batch end at different lengths. Every `segment_length` tokens the finished ones leave the batch and the
    cache, so that they stop costing; a cache that cannot give up rows is left alone, and a drafter's loop does this by
    itself.

    Args:
        target: the target.
        tokenizer: its tokenizer.
        drafter: speeds the target up; the words stay its own.
        batch_size: prompts at once.
        segment_length: tokens between two looks at what is finished.

    Example:

        >>> writer = LocalWriter(target, tokenizer, batch_size=8)  # doctest: +SKIP
        >>> for index, answer in writer.write(prompts, Sampling(), max_new_tokens=64, seed=0):  # doctest: +SKIP
        ...     texts[index] = answer.text
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: Any,
        *,
        drafter: Drafter | None = None,
        batch_size: int = 32,
        segment_length: int = SEGMENT_LENGTH,
    ):
        self.batch_size = batch_size
        self._target = target
        self._tokenizer = tokenizer
        self._drafter = drafter
        self._segment_length = segment_length

    def write(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, max_new_tokens: int, seed: int, stop: str = ""
    ) -> Iterator[tuple[int, Answer]]:
        """Yield each prompt's index and its answer, as `Writer.write` says; seeds torch's generators."""
        torch.manual_seed(seed)
        rows = [encode_prompt(prompt, self._tokenizer) for prompt in prompts]
        # alike lengths together: padding costs as much as words
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            call = _Call(self._target, self._tokenizer, sampling, stop)
            batch = _left_padded([rows[index] for index in chosen], call.pad_token_id, input_device(self._target))
            for row, token_ids in self._generate(call, *batch, max_new_tokens):
                yield chosen[row], call.answer(token_ids, rows[chosen[row]][-_CONTEXT_LENGTH:].tolist())

    def _generate(
        self, call: _Call, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int
    ) -> Iterator[tuple[int, list[int]]]:
        cache = None if self._drafter is not None else _selectable_cache(self._target, call.config)
        if cache is not None:
            yield from self._generate_in_segments(call, input_ids, attention_mask, max_new_tokens, cache)
            return
        options: dict[str, Any] = {} if self._drafter is None else {"assistant_model": self._drafter}
        sequences = call.generate(input_ids, attention_mask, max_new_tokens, **options)
        yield from enumerate(sequences[:, input_ids.shape[1] :].tolist())

    def _generate_in_segments(
        self, call: _Call, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, cache: DynamicCache
    ) -> Iterator[tuple[int, list[int]]]:
        prompt_length = input_ids.shape[1]
        rows = torch.arange(len(input_ids))
        while len(rows):
            num_left = prompt_length + max_new_tokens - input_ids.shape[1]
            num_tokens = min(self._segment_length, num_left)
            sequences = call.generate(input_ids, attention_mask, num_tokens, **{CACHE_KEY: cache})
            num_new = sequences.shape[1] - input_ids.shape[1]
            answers = sequences[:, prompt_length:].tolist()
            is_done = torch.tensor([num_new == num_left or call.is_ended(answer) for answer in answers])
            for row in is_done.nonzero().flatten().tolist():
                yield int(rows[row]), answers[row]
            keep = (~is_done).nonzero().flatten()
            rows = rows[keep]
            if len(rows):
                # the same indices on the device of what they select from
                kept = keep.to(sequences.device)
                cache.batch_select_indices(kept)
                input_ids = sequences[kept]
                # rows that go on have written no padding
                attention_mask = torch.nn.functional.pad(attention_mask[kept], (0, num_new), value=1)


class _Call:
    """One way of calling `generate`, and what its output means."""

    def __init__(self, target: PreTrainedModel, tokenizer: Any, sampling: Sampling, stop: str):
        self._target: Any = target
        self._tokenizer = tokenizer
        self._stop = stop
        self._end_ids = _end_ids(target, tokenizer, stop)
        self._needs_text = bool(stop) and stop not in tokenizer.get_vocab()
        self.config = self._configure(sampling)

    @property
    def pad_token_id(self) -> int:
        """The token that fills rows up."""
        return int(self.config.pad_token_id)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, num_tokens: int, **options: Any) -> Tensor:
        """Return the sequences with up to `num_tokens` more tokens."""
        config = copy.copy(self.config)
        config.max_new_tokens = num_tokens
        output = self._target.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            **options,
        )
        return output.sequences

    def is_ended(self, token_ids: Sequence[int]) -> bool:
        """Return whether an answer ends somewhere in these tokens."""
        return any(token_id in self._end_ids for token_id in token_ids) or (
            self._needs_text and self._stop in self._decode(token_ids)
        )

    def answer(self, token_ids: list[int], context_ids: list[int]) -> Answer:
        """Return the answer in these tokens, which follow `context_ids`, without the padding behind its end."""
        ends = [index for index, token_id in enumerate(token_ids) if token_id in self._end_ids]
        token_ids = token_ids[: ends[0] + 1] if ends else token_ids
        # alone, many tokenizers would drop the space in front
        context, text = self._decode(context_ids), self._decode([*context_ids, *token_ids])
        text = text[len(context) :] if text.startswith(context) else self._decode(token_ids)
        if self._needs_text and self._stop in text:
            # looked for after each segment: its last tokens lie behind the stop
            return Answer(text.partition(self._stop)[0], True, len(token_ids))
        return Answer(text, bool(ends), len(token_ids), tuple(token_ids))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _configure(self, sampling: Sampling) -> GenerationConfig:
        config = copy.deepcopy(self._target.generation_config)
        assert config is not None
        config.eos_token_id = sorted(self._end_ids) or None
        if config.pad_token_id is None:
            config.pad_token_id = min(self._end_ids, default=0)
        config.return_dict_in_generate = True
        config.do_sample = not sampling.is_greedy
        # neutral values, since the target's own defaults would replace None, and cut its distribution
        config.update(temperature=sampling.temperature or 1.0, top_p=sampling.top_p, typical_p=1.0, top_k=50)
        if config.do_sample:
            config.update(top_k=0, min_p=0.0, epsilon_cutoff=0.0, eta_cutoff=0.0)
        return config


def _end_ids(target: PreTrainedModel, tokenizer: Any, stop: str) -> set[int]:
    configured = getattr(target.generation_config, "eos_token_id", None)
    end_ids = set(configured if isinstance(configured, list) else [configured])
    if has_chat_template(tokenizer):
        end_ids.add(end_token_id(tokenizer))
    if stop:
        end_ids.add(tokenizer.get_vocab().get(stop))
    return {int(token_id) for token_id in (*end_ids, tokenizer.eos_token_id) if token_id is not None}


def _left_padded(rows: Sequence[Tensor], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, length - len(row) :] = row
        attention_mask[index, length - len(row) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def _selectable_cache(target: PreTrainedModel, config: GenerationConfig) -> DynamicCache | None:
    """Return an empty cache that can give up rows between two calls of `generate`, or None."""
    if is_stateful(target) or any(getattr(config, name, None) not in (None, 0) for name in _COUNTS_FROM_START):
        return None
    cache = empty_cache_like(target)
    # transformers 5.24: layers with a recurrent state inherit a selection that leaves that state out
    is_known = all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or is_placeholder_layer(layer)
        for layer in cache.layers
    )
    return cache if is_known else None
