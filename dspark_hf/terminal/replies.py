"""Let a target answer, with or without its drafter, and tell what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.statistics import SpeculationStatistics
from dspark_hf.generation.targets.adapter import input_device
from dspark_hf.terminal.streaming import Show, SourceStreamer

# who gives tokens, by the names that people are shown
SOURCE_NAMES = {"target": "target", "model": "drafter", "lookup": "lookup"}


@dataclass(frozen=True)
class Writing:
    """How an answer is written.

    Args:
        max_new_tokens: its length at most, in tokens.
        temperature: 0 is greedy.
        top_p: the share of probability that is sampled from.
        seed: what every answer starts from when sampling; None: another text each time.
        scheduler: who decides how far to draft, by name; None: what `generate` does by itself.
        num_drafts: drafts of a round at most; None: the drafter's block size.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    scheduler: str | None = None
    num_drafts: int | None = None

    @property
    def knobs(self) -> dict[str, Any]:
        """What `generate` is told of the drafts, beside who makes them."""
        given = {"scheduler": self.scheduler, "num_assistant_tokens": self.num_drafts}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken, so that the text is the same every time."""
        return self.temperature == 0


@dataclass(frozen=True)
class Reply:
    """What a target answered.

    Args:
        token_ids: the new tokens.
        sources: who gave each: `"target"`, `"model"` or `"lookup"`.
        text: what they say, without special tokens.
        seconds: time of the call, without that of showing.
        ended_by: `"end"` if the target ended it, `"length"`, or `"interrupt"`.
        statistics: of the call; None without a drafter.
    """

    token_ids: list[int]
    sources: list[str]
    text: str
    seconds: float
    ended_by: str
    statistics: SpeculationStatistics | None

    @property
    def speed(self) -> float:
        """Tokens per second, the prompt's pass included."""
        return len(self.token_ids) / self.seconds

    @property
    def tau(self) -> float | None:
        """Tokens per round; None where there was no round."""
        return None if self.statistics is None else _number(self.statistics.tau)

    @property
    def by_source(self) -> dict[str, int]:
        """Number of tokens that each source gave, by the names that people are shown."""
        return {shown: self.sources.count(source) for source, shown in SOURCE_NAMES.items()}

    def to_json(self) -> dict[str, Any]:
        """Return what a program may want to know, in plain types."""
        return {
            "text": self.text,
            "tokens": len(self.token_ids),
            "by_source": self.by_source,
            "tau": self.tau,
            "tokens_per_second": self.speed,
            "seconds": self.seconds,
            "ended_by": self.ended_by,
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.by_source.items() if count)
        parts = [f"{len(self.token_ids)} tokens ({counts})", f"{self.speed:.1f} tokens/s"]
        if self.tau is not None:
            parts.insert(1, f"tau {self.tau:.2f}")
        if self.ended_by == "interrupt":
            parts.append("stopped")
        return "; ".join(parts)


class Speaker:
    """A target that answers, its drafter, and how it writes.

    Args:
        tokenizer: the target's.
        target: the model.
        drafter: what assists it.
        writing: how answers are written.
        end_ids: tokens that end an answer, besides those that the target knows of.
    """

    def __init__(self, tokenizer: Any, target: Any, drafter: Drafter, writing: Writing, end_ids: tuple[int, ...] = ()):
        self.tokenizer, self.target, self.drafter, self.writing = tokenizer, target, drafter, writing
        known = target.generation_config.eos_token_id
        known = known if isinstance(known, list) else [] if known is None else [known]
        self._end_ids = list(dict.fromkeys((*known, *end_ids)))
        self._streamer: SourceStreamer | None = None
        self._start = 0.0

    def note(self) -> str:
        """Return tau and speed of the answer that is being written."""
        if self._streamer is None or not self._streamer.token_ids:
            return "reading the prompt"
        num_tokens = len(self._streamer.token_ids)
        # from the first token on, so that a long prompt does not hide how fast the text comes
        seconds = perf_counter() - self._start
        parts = [f"{num_tokens} tokens", f"{(num_tokens - 1) / seconds:.1f} tokens/s"] if num_tokens > 1 else []
        statistics = self._statistics()
        if statistics is not None and statistics.num_rounds:
            parts.insert(0, f"tau {statistics.tau:.2f}")
        return "; ".join(parts)

    def reply(self, token_ids: Tensor, show: Show, *, is_assisted: bool = True) -> Reply:
        """Return the answer to a prompt `(T,)`, which `show` is given as it is written; Ctrl-C ends it early.

        Raises:
            ValueError: if the target has no room for a prompt of this length and an answer.
        """
        room = self._room(len(token_ids))
        self.drafter.last_statistics = None
        streamer = self._streamer = SourceStreamer(self.tokenizer, self._starting(show), self._sources)
        inputs = {"input_ids": token_ids[None].to(input_device(self.target))}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        ended_by, start = None, perf_counter()
        self._start = start
        with _seeded(self.writing):
            try:
                self.target.generate(
                    **inputs,
                    **self._options(min(room, self.writing.max_new_tokens)),
                    streamer=streamer,
                    **({"assistant_model": self.drafter, **self.writing.knobs} if is_assisted else {}),
                )
            except KeyboardInterrupt:
                ended_by = "interrupt"
        seconds = max(perf_counter() - start - streamer.seconds, 1e-9)
        if ended_by is None:
            ended_by = "end" if streamer.token_ids[-1:] and streamer.token_ids[-1] in self._end_ids else "length"
        text = str(self.tokenizer.decode(streamer.token_ids, skip_special_tokens=True))
        statistics = self._statistics() if is_assisted else None
        return Reply(streamer.token_ids, streamer.sources, text, seconds, ended_by, statistics)

    def _room(self, length: int) -> int:
        limit = getattr(self.target.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return self.writing.max_new_tokens
        if length >= limit:
            raise ValueError(
                f"`prompt` must leave room for an answer in the target's {limit} positions, got {length} tokens. "
                "Shorten it, or begin anew (/clear in a chat)."
            )
        return limit - length

    def _options(self, max_new_tokens: int) -> dict[str, Any]:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        if self._end_ids:
            options["eos_token_id"] = self._end_ids
        if self.writing.is_greedy:
            return {**options, "do_sample": False}
        return {
            **options,
            "do_sample": True,
            "temperature": self.writing.temperature,
            "top_p": self.writing.top_p,
            # whatever the target's generation configuration prefers
            "top_k": 0,
        }

    def _starting(self, show: Show) -> Show:
        def show_timed(piece: str, source: str) -> None:
            if self._streamer is not None and len(self._streamer.token_ids) == 1:
                self._start = perf_counter()
            show(piece, source)

        return show_timed

    def _statistics(self) -> SpeculationStatistics | None:
        return self.drafter.last_statistics

    def _sources(self) -> list[str]:
        statistics = self._statistics()
        return [] if statistics is None else statistics.token_sources[0]


@contextmanager
def _seeded(writing: Writing) -> Iterator[None]:
    if writing.seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(writing.seed)
        yield


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
