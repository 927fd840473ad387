"""Tokens per second with and without a drafter, measured in turns so that a slow minute hits all ways alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from dspark_hf.evaluation.records import Answer


@dataclass(frozen=True)
class Speed:
    """Speed of a drafter against plain `generate`, medians over repeats.

    Attributes:
        scheduler: what decided how many drafts were made and verified.
        batch_size: rows per call at most.
        plain_tokens_per_second: speed of plain `generate`.
        tokens_per_second: speed with the drafter.
        ratio: the latter over the former, median of the repeats' own ratios.
        lowest_ratio: smallest ratio of a repeat.
        highest_ratio: largest ratio of a repeat.
        num_identical: rows whose tokens equal those of plain `generate` in every repeat; None when sampling.
        num_outputs: number of rows.
    """

    scheduler: str
    batch_size: int
    plain_tokens_per_second: float
    tokens_per_second: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    num_identical: int | None
    num_outputs: int


def summarize_speed(
    plain: Sequence[Sequence[Answer]],
    assisted: Sequence[Sequence[Answer]],
    *,
    scheduler: str,
    batch_size: int,
    is_greedy: bool,
) -> Speed:
    """Return the speed, given the answers of every call: one inner entry per repeat."""
    plain_speeds, speeds = _speeds(plain), _speeds(assisted)
    ratios = [ours / theirs for ours, theirs in zip(speeds, plain_speeds, strict=True)]
    return Speed(
        scheduler=scheduler,
        batch_size=batch_size,
        plain_tokens_per_second=median(plain_speeds),
        tokens_per_second=median(speeds),
        ratio=median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        num_identical=_num_identical(plain, assisted) if is_greedy else None,
        num_outputs=sum(len(answers[0].token_ids) for answers in plain),
    )


def _speeds(calls: Sequence[Sequence[Answer]]) -> list[float]:
    """Return the tokens per second of every repeat."""
    return [
        sum(one.num_tokens for one in answers) / sum(one.seconds for one in answers)
        for answers in zip(*calls, strict=True)
    ]


def _num_identical(plain: Sequence[Sequence[Answer]], assisted: Sequence[Sequence[Answer]]) -> int:
    count = 0
    for references, answers in zip(plain, assisted, strict=True):
        for row, token_ids in enumerate(references[0].token_ids):
            count += all(answer.token_ids[row] == token_ids for answer in answers)
    return count
