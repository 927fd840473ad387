"""Batches to measure: prompts by number of rows, ways to decode them, and how long each way took.

R rows, T prompt length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, stdev
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.prompts import pad_left

PLAIN = "plain"
FIXED = ("fixed 3", "fixed 5", "fixed 7")
DEFAULT = "default"
# by name: what `generate` is told besides the drafter
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "fixed 3": {"scheduler": "fixed", "num_assistant_tokens": 3},
    "fixed 5": {"scheduler": "fixed", "num_assistant_tokens": 5},
    "fixed 7": {"scheduler": "fixed", "num_assistant_tokens": 7},
    "hardware_aware": {"scheduler": "hardware_aware"},
    "asynchronous": {"scheduler": "asynchronous"},
    DEFAULT: {},
}


@dataclass(frozen=True)
class Load:
    """A left-padded batch, and what `generate` is told about the text."""

    token_ids: Tensor
    attention_mask: Tensor
    options: dict[str, Any]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.token_ids)


@dataclass
class Measured:
    """One way's runs: seconds, new tokens of all rows, and what the speculation did, a number a run."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    tau: list[float] = field(default_factory=list)
    verified: list[float] = field(default_factory=list)
    is_identical: list[bool] = field(default_factory=list)

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of every run."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    @property
    def speed(self) -> float:
        """Median of the speeds."""
        return median(self.speeds)

    def ratio_to(self, other: Measured) -> float:
        """Return the median over the runs of this speed by the other's in the same run."""
        return median(self.ratios_to(other))

    def error_of_ratio_to(self, other: Measured) -> float:
        """Return about how far that median may be off by chance: its standard error, were the ratios normal."""
        ratios = self.ratios_to(other)
        return math.sqrt(math.pi / 2 / len(ratios)) * stdev(ratios) if len(ratios) > 1 else math.nan

    def ratios_to(self, other: Measured) -> list[float]:
        """Return this speed by the other's, of every run."""
        return [ours / theirs for ours, theirs in zip(self.speeds, other.speeds, strict=True)]


def make_load(prompts: Sequence[Tensor], pad_token_id: int, device: torch.device, options: dict[str, Any]) -> Load:
    """Return the prompts `(T,)` as one left-padded batch."""
    inputs = pad_left(prompts, device, pad_token_id)
    return Load(inputs["input_ids"], inputs["attention_mask"], {**options, "pad_token_id": pad_token_id})


def random_prompts(num_prompts: int, vocab_size: int, seed: int) -> list[Tensor]:
    """Return prompts of 16 to 64 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(16, 65, (num_prompts,), generator=generator).tolist()
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def num_new_tokens(new: Tensor, eos_token_id: int | Sequence[int] | None) -> int:
    """Return how many of the new tokens `(R, length)` are text, each row's end included."""
    if eos_token_id is None:
        return new.numel()
    ends = torch.isin(new, torch.tensor(eos_token_id, device=new.device))
    # a token counts unless an end came before it
    return int((ends.long().cumsum(1) - ends.long() == 0).sum())


def run_once(
    target: Any,
    drafter: Drafter,
    way: str,
    load: Load,
    max_new_tokens: int,
    measured: Measured,
    clock: Callable[[], float] = perf_counter,
) -> Tensor:
    """Generate once, add what it took to `measured`, and return the new tokens `(R, length)`."""
    options = {**load.options, **WAYS[way]}
    if way != PLAIN:
        # what is looked up is measured by benchmarks/lookup.py
        options.update(assistant_model=drafter, drafts="model")
    _wait(target.device)
    start = clock()
    output = target.generate(
        load.token_ids, attention_mask=load.attention_mask, max_new_tokens=max_new_tokens, **options
    )
    _wait(target.device)
    measured.seconds.append(clock() - start)
    new = output[:, load.token_ids.shape[1] :]
    ends = load.options.get("eos_token_id", target.generation_config.eos_token_id)
    measured.tokens.append(num_new_tokens(new, ends))
    if way != PLAIN:
        statistics = drafter.last_statistics
        assert statistics is not None
        measured.tau.append(statistics.tau)
        measured.verified.append(statistics.num_verified / max(statistics.num_rounds, 1))
    return new


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
