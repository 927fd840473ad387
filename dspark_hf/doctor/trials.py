"""Try every reading of a drafter on recorded text, and follow what is surely better.

N blocks, K drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_hf.doctor.drafting import Outcome, draft
from dspark_hf.doctor.readings import Reading, neighbours
from dspark_hf.doctor.recording import Recorded
from dspark_hf.doctor.results import Trial
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel

# accepted drafts a block by which a reading has to be better, in numbers and in standard errors: blocks of one text
# overlap, and a dozen readings are compared
_LEAST_GAIN, _LEAST_ERRORS = 0.25, 3.0
# things that may be mistaken at once
_MOST_CHANGES = 3
# tokens that are tried as the mask
_MOST_MASKS = 6
_MASK_NAMES = ("<|MASK|>", "<|mask|>", "[MASK]", "<mask>", "<|fim_pad|>", "<|endoftext|>")


@dataclass(frozen=True)
class Findings:
    """Trials, the configured one first; the best reading, its trial, and the configured one's outcome."""

    trials: list[Trial]
    best: Reading
    best_trial: Trial
    configured: Outcome


def try_readings(
    drafter: DSparkAssistantModel,
    texts: Sequence[Recorded],
    target: TargetAdapter,
    mask_ids: Sequence[int],
    *,
    blocks_per_text: int,
    advance: Callable[[], None] = lambda: None,
) -> Findings:
    """Return what becomes of the drafts under each reading that differs from the configuration in one thing.

    Where one is surely better, those that differ from it are tried, too: a file may be mistaken twice.
    """
    config = drafter.config
    current = Reading.configured(config)
    done: dict[Reading, Outcome] = {}
    for _ in range(1 + _MOST_CHANGES):
        around = list(neighbours(current, config, target.num_layers, mask_ids))
        for reading in (current, *around):
            if reading not in done:
                done[reading] = draft(drafter, reading, texts, target, blocks_per_text=blocks_per_text)
                advance()
        chosen = _likeliest(current, around, done)
        if chosen == current:
            break
        current = chosen
    trials = {reading: to_trial(reading.describe(config), reading, config, found) for reading, found in done.items()}
    first = next(iter(done))
    return Findings(list(trials.values()), current, trials[current], done[first])


def _likeliest(current: Reading, others: Sequence[Reading], done: dict[Reading, Outcome]) -> Reading:
    """Return the first of the readings that are as good as the best one, if that is surely better than `current`."""
    better = [one for one in others if is_better(done[one].num_accepted, done[current].num_accepted)]
    if not better:
        return current
    best = max(better, key=lambda one: float(done[one].num_accepted.float().mean()))
    as_good = (one for one in better if not is_better(done[best].num_accepted, done[one].num_accepted))
    return next(as_good, best)


def is_better(one: Tensor, other: Tensor) -> bool:
    """Return whether blocks `(N,)` of one reading are surely accepted further than the same ones of another."""
    gains = one.double() - other.double()
    if len(gains) < 2:
        return False
    error = float(gains.std()) / len(gains) ** 0.5
    return float(gains.mean()) > max(_LEAST_GAIN, _LEAST_ERRORS * error)


def to_trial(label: str, reading: Reading, config: DSparkConfig, outcome: Outcome) -> Trial:
    """Return the counts of an outcome by position."""
    changes = reading.changes(config)
    accepted = tuple(int((outcome.num_accepted > k).sum()) for k in range(outcome.block_size))
    return Trial(
        label=label,
        cause=next(iter(changes), "fits"),
        settings=reading.settings(config),
        num_reached=(len(outcome.num_accepted), *accepted[:-1]),
        num_accepted=accepted,
    )


def expected_rate(outcome: Outcome) -> float | None:
    """Return the share of first drafts that the confidence head expects to be accepted, or None without one."""
    return None if outcome.confidence is None else float(outcome.confidence[:, 0].mean())


def mask_candidates(target: TargetAdapter, tokenizer: Any) -> list[int]:
    """Return tokens that drafters are known to be trained with as masks, the likeliest first."""
    config, size = target.config, target.vocab_size
    named: list[int | None] = []
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        named = [getattr(tokenizer, "mask_token_id", None), *(vocabulary.get(name) for name in _MASK_NAMES)]
        named += [tokenizer.pad_token_id, tokenizer.unk_token_id]
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    named += [getattr(config, "pad_token_id", None), size - 1, *ends, getattr(config, "bos_token_id", None), 0]
    ids = dict.fromkeys(token for token in named if isinstance(token, int) and 0 <= token < size)
    return list(ids)[:_MOST_MASKS]


def mean_gain(one: Outcome, other: Outcome) -> tuple[float, float]:
    """Return by how many drafts a block of one text is accepted further than a block of another, and its error."""
    a, b = one.num_accepted.double(), other.num_accepted.double()
    if min(len(a), len(b)) < 2:
        return 0.0, float("inf")
    error = torch.stack([x.var() / len(x) for x in (a, b)]).sum().sqrt()
    return float(a.mean() - b.mean()), float(error)
