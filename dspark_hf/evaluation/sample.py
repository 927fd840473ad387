"""One answer to look at: which of its words were drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dspark_hf.evaluation.records import Answer
from dspark_hf.pieces import TextPieces


@dataclass(frozen=True)
class TextRun:
    """Words of an answer that were all accepted drafts, or all the target's own."""

    text: str
    is_draft: bool


@dataclass(frozen=True)
class SampleAnswer:
    """The beginning of the first prompt's answer; `set_name` is its set, `num_drafts` of `num_tokens` were drafts."""

    set_name: str
    temperature: float
    num_tokens: int
    num_drafts: int
    runs: tuple[TextRun, ...]


def sample_answer(answer: Answer, tokenizer: Any, set_name: str, temperature: float) -> SampleAnswer:
    """Return an answer of one row, with its rounds, as runs of text."""
    token_ids = answer.token_ids[0]
    origins = token_origins(answer)[: len(token_ids)]
    pieces = TextPieces(tokenizer)
    pairs = [(pieces.add(token_id), is_draft) for token_id, is_draft in zip(token_ids, origins, strict=True)]
    runs = [
        TextRun("".join(text for text, _ in group), is_draft)
        for is_draft, group in groupby(pairs, key=lambda pair: pair[1])
    ]
    return SampleAnswer(set_name, temperature, len(token_ids), sum(origins), tuple(runs))


def token_origins(answer: Answer) -> Sequence[bool]:
    """Return for every new token of a row whether it was a draft; the prefill gives the first one."""
    origins = [False]
    for one in answer.rounds or ():
        num_drafts = min(one.num_accepted, one.num_committed)
        origins += [True] * num_drafts + [False] * (one.num_committed - num_drafts)
    missing = len(answer.token_ids[0]) - len(origins)
    return origins + [False] * missing
