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
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.requests.request import Request
from dspark_hf.generation.requests.stream import RequestStream, generate_stream
from dspark_hf.generation.targets.adapter import input_device
from dspark_hf.prompts import Prompt, encode_prompt, end_token_id, has_chat_template

# tokens of the prompt that are decoded with an answer, and taken off again
_CONTEXT_LENGTH = 4

# Prompts to give at once, so that rows that are done go on with another. Plain choice: the last answers, beside which
# rows are empty, are then a small part.
_PROMPTS_PER_ROW = 4
# what `generate` can do and a stream of requests refuses, and its neutral values
_BATCHES_ONLY = ("cache_implementation", "guidance_scale", "watermarking_config", "num_beams")
_NEUTRAL = (None, 1)


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
    """A target, loaded here, that writes several answers at once.

    An answer that is finished gives its row to the next prompt. A target whose rows cannot come and go writes one
    batch after the other, each as long as its longest answer.

    Args:
        target: the target.
        tokenizer: its tokenizer.
        drafter: speeds the target up; the words stay its own.
        batch_size: answers at once; four times as many prompts are best given at once, so that rows find new ones.

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
    ):
        self.batch_size = _PROMPTS_PER_ROW * batch_size
        self._num_rows = batch_size
        self._target = target
        self._tokenizer = tokenizer
        self._drafter = drafter

    def write(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, max_new_tokens: int, seed: int, stop: str = ""
    ) -> Iterator[tuple[int, Answer]]:
        """Yield each prompt's index and its answer, as `Writer.write` says; seeds torch's generators."""
        torch.manual_seed(seed)
        rows = [encode_prompt(prompt, self._tokenizer) for prompt in prompts]
        # alike lengths together: padding costs as much as words
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        call = _Call(self._target, self._tokenizer, sampling, stop)
        stream = self._stream(call, {index: rows[index] for index in order}, max_new_tokens)
        written = self._in_batches(call, rows, order, max_new_tokens) if stream is None else _written(stream)
        for index, token_ids in written:
            yield index, call.answer(token_ids, rows[index][-_CONTEXT_LENGTH:].tolist())

    def _stream(self, call: _Call, rows: dict[int, Tensor], max_new_tokens: int) -> RequestStream | None:
        """Return the answers as they become ready, or None for a target that cannot write them so."""
        if any(getattr(call.config, name, None) not in _NEUTRAL for name in _BATCHES_ONLY):
            return None
        requests = (Request(row, call.options(row, max_new_tokens), key=index) for index, row in rows.items())
        try:
            return generate_stream(self._target, requests, drafter=self._drafter, max_rows=self._num_rows)
        except ValueError:
            # of its kind of attention, say
            return None

    def _in_batches(
        self, call: _Call, rows: Sequence[Tensor], order: Sequence[int], max_new_tokens: int
    ) -> Iterator[tuple[int, list[int]]]:
        options: dict[str, Any] = {} if self._drafter is None else {"assistant_model": self._drafter}
        for start in range(0, len(order), self._num_rows):
            chosen = order[start : start + self._num_rows]
            input_ids, attention_mask = _left_padded(
                [rows[index] for index in chosen], call.pad_token_id, input_device(self._target)
            )
            sequences = call.generate(input_ids, attention_mask, max_new_tokens, **options)
            yield from zip(chosen, sequences[:, input_ids.shape[1] :].tolist(), strict=True)


def _written(stream: RequestStream) -> Iterator[tuple[int, list[int]]]:
    with stream:
        for finished in stream:
            if finished.error is not None:
                raise finished.error
            assert finished.token_ids is not None
            yield finished.request.key, finished.token_ids[len(finished.request.input_ids) :].tolist()


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
        sequences: Tensor = self._target.generate(
            input_ids, attention_mask=attention_mask, generation_config=self._config_of(num_tokens), **options
        )
        return sequences

    def options(self, prompt: Tensor, num_tokens: int) -> dict[str, Any]:
        """Return the options of a request that continues a prompt `(T,)` by up to `num_tokens`."""
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(prompt),
            "generation_config": self._config_of(num_tokens),
        }
        if self._needs_text:
            options["stopping_criteria"] = [_StopText(self._tokenizer, self._stop, len(prompt))]
        return options

    def _config_of(self, num_tokens: int) -> GenerationConfig:
        config = copy.copy(self.config)
        config.max_new_tokens = num_tokens
        return config

    def answer(self, token_ids: list[int], context_ids: list[int]) -> Answer:
        """Return the answer in these tokens, which follow `context_ids`, without the padding behind its end."""
        ends = [index for index, token_id in enumerate(token_ids) if token_id in self._end_ids]
        token_ids = token_ids[: ends[0] + 1] if ends else token_ids
        # alone, many tokenizers would drop the space in front
        context, text = self._decode(context_ids), self._decode([*context_ids, *token_ids])
        text = text[len(context) :] if text.startswith(context) else self._decode(token_ids)
        if self._needs_text and self._stop in text:
            # its last tokens may lie behind the stop
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
        config.return_dict_in_generate = False
        config.do_sample = not sampling.is_greedy
        # neutral values, since the target's own defaults would replace None, and cut its distribution
        config.update(temperature=sampling.temperature or 1.0, top_p=sampling.top_p, typical_p=1.0, top_k=50)
        if config.do_sample:
            config.update(top_k=0, min_p=0.0, epsilon_cutoff=0.0, eta_cutoff=0.0)
        return config


class _StopText(StoppingCriteria):
    """End a row whose answer holds `stop`; looked for in its latest tokens only.

    A text that a tokenizer joins otherwise may be missed here: the answer is searched as a whole once it is written.
    """

    def __init__(self, tokenizer: Any, stop: str, prompt_length: int):
        self._tokenizer = tokenizer
        self._stop = stop
        self._prompt_length = prompt_length
        # a token is a byte at least
        self._num_tokens = len(stop.encode()) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        latest = input_ids[:, max(self._prompt_length, input_ids.shape[1] - self._num_tokens) :]
        texts = self._tokenizer.batch_decode(latest, skip_special_tokens=True)
        return torch.tensor([self._stop in text for text in texts], device=input_ids.device)


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
