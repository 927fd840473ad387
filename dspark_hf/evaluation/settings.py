"""What to evaluate, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_hf.generation.scheduling import AdaptiveScheduler
from dspark_hf.generation.scheduling.choosing import SCHEDULERS

# what `generate` uses where nothing is said
DEFAULT_SCHEDULERS = (AdaptiveScheduler.name,)


@dataclass(frozen=True)
class EvaluationSettings:
    """How to measure; which models and prompts is said elsewhere.

    Args:
        max_new_tokens: length of an answer at most, in tokens.
        temperatures: 0 is greedy; any other samples, with neither top-k nor top-p.
        num_drafts: drafts per round, Transformers' `num_assistant_tokens`; None means each drafter's block size.
        repeats: answers per prompt and variant. Speeds are medians over them; sampled acceptance is over all of them.
        batch_size: rows per call of an additional measurement of speed; 1 means none.
        schedulers: names of those to measure the speed with; `"fixed"`, which shows what becomes of every draft, is
            always measured, too.
        seed: seed of the first sampled answer.

    Raises:
        ValueError: if a field breaks a rule; the message names it.
    """

    max_new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0,)
    num_drafts: int | None = None
    repeats: int = 3
    batch_size: int = 1
    schedulers: tuple[str, ...] = DEFAULT_SCHEDULERS
    seed: int = 0

    def __post_init__(self) -> None:
        # the first token comes from the prefill: two are needed for a round
        _require(self.max_new_tokens >= 2, "--max-new-tokens", "be at least 2", self.max_new_tokens, "Raise it.")
        are_valid = bool(self.temperatures) and all(0 <= one < math.inf for one in self.temperatures)
        _require(are_valid, "--temperature", "be 0 (greedy) or larger", self.temperatures, "Correct it.")
        are_different = len(set(self.temperatures)) == len(self.temperatures)
        _require(are_different, "--temperature", "be given once per value", self.temperatures, "Remove one.")
        for name, value in (("--repeats", self.repeats), ("--batch-size", self.batch_size)):
            _require(value >= 1, name, "be at least 1", value, "Raise it.")
        for name in self.schedulers:
            _require(name in SCHEDULERS, "--scheduler", f"be one of {', '.join(SCHEDULERS)}", name, "Correct it.")
        are_different = len(set(self.schedulers)) == len(self.schedulers)
        _require(are_different, "--scheduler", "be given once per value", self.schedulers, "Remove one.")
        if self.num_drafts is not None:
            _require(self.num_drafts >= 1, "--num-drafts", "be at least 1", self.num_drafts, "Leave it out for all.")


def name_all(values: list[Path], what: str, short_name: Callable[[Path], str]) -> dict[str, Path]:
    """Return the values under their short names, or under their whole text where short names would be equal.

    Raises:
        ValueError: if a value is given twice.
    """
    texts = [str(value) for value in values]
    for text in texts:
        _require(texts.count(text) == 1, what, "be given once per value", text, "Remove the repetition.")
    short = [short_name(value) for value in values]
    return {
        name if short.count(name) == 1 else text: value for name, text, value in zip(short, texts, values, strict=True)
    }


def _require(holds: bool, name: str, rule: str, value: Any, remedy: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` must {rule}, got {value}. {remedy}")
