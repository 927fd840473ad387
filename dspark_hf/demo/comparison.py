"""Answer a prompt with and without a drafter, and compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

from transformers import BatchEncoding, PreTrainedModel

from dspark_hf.generation.statistics import SourceCounts, SpeculationStatistics
from dspark_hf.terminal.streaming import SourceStreamer


@dataclass(frozen=True)
class Answer:
    """One call of `generate`: its new tokens, its time without the streamer's, its passes of the target."""

    token_ids: list[int]
    seconds: float
    num_target_passes: int
    statistics: SpeculationStatistics | None


@dataclass
class Comparison:
    """All answers to one prompt; the first of each way speaks for its tokens, the median for its time."""

    kind: str = ""
    inputs: Any = None
    plain: list[Answer] = field(default_factory=list)
    assisted: list[Answer] = field(default_factory=list)

    @property
    def is_identical(self) -> bool:
        """Whether every answer has the same tokens."""
        return all(answer.token_ids == self.plain[0].token_ids for answer in self.plain + self.assisted)

    @property
    def statistics(self) -> SpeculationStatistics:
        """What the first assisted answer measured."""
        statistics = self.assisted[0].statistics
        assert statistics is not None
        return statistics


@dataclass(frozen=True)
class Summary:
    """Comparisons added up: times are sums of the prompts' medians, `tau` is tokens per round over all rounds.

    `accept_rates` are the drafter's, by position; `num_looked_up` counts looked-up drafts that the target checked, of
    which it accepted `lookup_rate`.
    """

    is_identical: bool
    tau: float
    plain_passes: int
    assisted_passes: int
    plain_speed: float
    assisted_speed: float
    accept_rates: list[float]
    num_looked_up: int
    lookup_rate: float

    @property
    def ratio(self) -> float:
        """Assisted speed over plain speed."""
        return self.assisted_speed / self.plain_speed


def encode_prompt(tokenizer: Any, prompt: str) -> BatchEncoding:
    """Return the model inputs for a question, through the chat template where the tokenizer has one."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def answer(target: Any, inputs: BatchEncoding, *, streamer: SourceStreamer | None = None, **options: Any) -> Answer:
    """Return the target's greedy answer; `options` go to `generate`."""
    inputs = inputs.to(target.device)
    with _counted_passes(target) as passes:
        start = perf_counter()
        output = target.generate(**inputs, do_sample=False, streamer=streamer, **options)
        token_ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        seconds = perf_counter() - start
    drafter = options.get("assistant_model")
    return Answer(
        token_ids=token_ids,
        seconds=seconds - (0.0 if streamer is None else streamer.seconds),
        num_target_passes=len(passes),
        statistics=None if drafter is None else drafter.last_statistics,
    )


@contextmanager
def _counted_passes(target: PreTrainedModel) -> Iterator[list[None]]:
    passes: list[None] = []
    hook = target.register_forward_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        hook.remove()


def summarize(comparisons: Sequence[Comparison]) -> Summary:
    """Return the totals of one or more comparisons."""
    all_statistics = [comparison.statistics for comparison in comparisons]
    num_tokens = sum(len(comparison.plain[0].token_ids) for comparison in comparisons)
    num_assisted_tokens = sum(len(comparison.assisted[0].token_ids) for comparison in comparisons)
    lookups = [statistics.by_source["lookup"] for statistics in all_statistics]
    num_looked_up = sum(counts.num_verified for counts in lookups)
    num_rounds = sum(statistics.num_rounds for statistics in all_statistics)
    return Summary(
        is_identical=all(comparison.is_identical for comparison in comparisons),
        tau=sum(statistics.num_committed for statistics in all_statistics) / max(num_rounds, 1),
        plain_passes=sum(comparison.plain[0].num_target_passes for comparison in comparisons),
        assisted_passes=sum(comparison.assisted[0].num_target_passes for comparison in comparisons),
        plain_speed=num_tokens / sum(_median_seconds(comparison.plain) for comparison in comparisons),
        assisted_speed=num_assisted_tokens / sum(_median_seconds(comparison.assisted) for comparison in comparisons),
        accept_rates=_accept_rates([one.by_source["model"] for one in all_statistics]),
        num_looked_up=num_looked_up,
        lookup_rate=sum(one.num_accepted for one in lookups) / max(num_looked_up, 1),
    )


def _median_seconds(answers: Sequence[Answer]) -> float:
    return median(one.seconds for one in answers)


def _accept_rates(all_counts: Sequence[SourceCounts]) -> list[float]:
    num_positions = max((len(counts.verified_by_position) for counts in all_counts), default=0)
    rates = []
    for position in range(num_positions):
        reached = [one for one in all_counts if position < len(one.verified_by_position)]
        num_verified = sum(one.verified_by_position[position] for one in reached)
        num_accepted = sum(one.accepted_by_position[position] for one in reached)
        rates.append(num_accepted / max(num_verified, 1))
    return rates
