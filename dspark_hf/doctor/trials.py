"""Try every reading of a drafter on recorded text, and follow what is surely better.

N blocks, K drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dspark_hf.doctor.drafting import Outcome, draft
from dspark_hf.doctor.readings import Reading, neighbours
from dspark_hf.doctor.recording import Recorded
from dspark_hf.doctor.results import Trial
from dspark_hf.generation.targets.adapter import TargetAdapter
from dspark_hf.modeling.configuration_dspark import DSparkConfig
from dspark_hf.modeling.modeling_dspark import DSparkAssistantModel

# accepted drafts a block by which a reading has to be better, and of how many standard errors: a large gain is rarely
# found by chance, a small one more often, since a dozen readings are compared
LARGE_GAIN, _LARGE_ERRORS = 0.15, 2.0
_LEAST_GAIN, _LEAST_ERRORS = 0.03, 3.0
# of the blocks, one in so many is looked at for every reading, and all for those that are not surely worse
_FIRST_LOOK = 4
# standard errors from which on it is worth a look at more text
_DOUBTFUL_ERRORS = 1.0
# things that may be mistaken at once
_MOST_CHANGES = 3
# tokens that are tried as the mask
_MOST_MASKS = 6
_MASK_NAMES = ("<|MASK|>", "<|mask|>", "[MASK]", "<mask>", "<|fim_pad|>", "<|endoftext|>")


@dataclass(frozen=True)
class Gain:
    """By how many drafts a block is accepted further than the same one under another reading, and its standard error.

    `mean` is over the places; `error` takes into account that blocks at places near each other overlap.
    """

    mean: float
    error: float
    num_blocks: int

    @classmethod
    def of(cls, one: Outcome, other: Outcome) -> Gain:
        """Return the gain of an outcome over another one at the same places."""
        gains = one.num_accepted.double() - other.num_accepted.double()
        count = len(gains)
        if count < 2:
            return cls(0.0, float("inf"), count)
        deviations = gains - gains.mean()
        own = float(deviations.square().mean())
        # Newey and West's variance of a mean, with as many lags as a block has drafts; never below that without lags
        lags = min(max(one.block_size, other.block_size), count - 1)
        shared = [
            2 * (1 - lag / (lags + 1)) * float((deviations[lag:] * deviations[:-lag]).sum()) / count
            for lag in range(1, lags + 1)
        ]
        return cls(float(gains.mean()), (max(own + sum(shared), own) / (count - 1)) ** 0.5, count)

    def is_sure(self) -> bool:
        """Return whether this is a gain, by so many standard errors as its size asks for."""
        errors = _LARGE_ERRORS if self.mean > LARGE_GAIN else _LEAST_ERRORS
        return self.mean > max(_LEAST_GAIN, errors * self.error)

    def is_possible(self) -> bool:
        """Return whether this looks like a gain, and more text would tell."""
        return self.mean > max(_LEAST_GAIN, _DOUBTFUL_ERRORS * self.error)

    def is_surely_none(self) -> bool:
        """Return whether more places would not make this a gain."""
        # where no block differs, one in so many may
        error = max(self.error, 1 / max(self.num_blocks, 1))
        return self.mean + _LEAST_ERRORS * error < _LEAST_GAIN


@dataclass(frozen=True)
class Findings:
    """Trials, the configured one first; the best reading, its trial, and the configured one's outcome.

    `doubtful` is the trial of a reading that seems better than the best one, where more text would tell, or None.
    """

    trials: list[Trial]
    best: Reading
    best_trial: Trial
    configured: Outcome
    doubtful: Trial | None


def try_readings(
    drafter: DSparkAssistantModel,
    texts: Sequence[Recorded],
    target: TargetAdapter,
    mask_ids: Sequence[int],
    *,
    blocks_per_text: int,
) -> Findings:
    """Return what becomes of the drafts under each reading that differs from the configuration in one thing.

    A few blocks tell which readings are surely no better; the others draft at all places. Where one is surely better,
    those that differ from it are tried, too: a file may be mistaken twice.
    """
    config = drafter.config
    configured = current = Reading.configured(config)
    few: dict[Reading, Outcome] = {}
    many: dict[Reading, Outcome] = {}

    def look(reading: Reading, seen: dict[Reading, Outcome], blocks: int) -> Outcome:
        if reading not in seen:
            seen[reading] = draft(drafter, reading, texts, target, blocks_per_text=blocks)
        return seen[reading]

    first_look = -(-blocks_per_text // _FIRST_LOOK)
    for _ in range(1 + _MOST_CHANGES):
        around = list(neighbours(current, config, target.num_layers, mask_ids))
        own = look(current, few, first_look)
        near = [one for one in around if not Gain.of(look(one, few, first_look), own).is_surely_none()]
        for reading in (current, *near):
            look(reading, many, blocks_per_text)
        chosen = _likeliest(current, near, many)
        if chosen == current:
            break
        current = chosen

    def trial(reading: Reading) -> Trial:
        seen = many if reading in many else few
        gain = None if reading == configured else Gain.of(seen[reading], seen[configured])
        return to_trial(reading.describe(config), reading, config, seen[reading], gain)

    open_ones = [one for one in near if Gain.of(many[one], many[current]).is_possible()]
    return Findings(
        [trial(reading) for reading in few],
        current,
        trial(current),
        many[configured],
        trial(open_ones[0]) if open_ones else None,
    )


def _likeliest(current: Reading, others: Sequence[Reading], done: dict[Reading, Outcome]) -> Reading:
    """Return the first of the readings that are as good as the best one, if that is surely better than `current`."""
    better = [one for one in others if Gain.of(done[one], done[current]).is_sure()]
    if not better:
        return current
    best = max(better, key=lambda one: float(done[one].num_accepted.float().mean()))
    as_good = (one for one in better if not Gain.of(done[best], done[one]).is_sure())
    return next(as_good, best)


def to_trial(label: str, reading: Reading, config: DSparkConfig, outcome: Outcome, gain: Gain | None = None) -> Trial:
    """Return the counts of an outcome by position."""
    changes = reading.changes(config)
    accepted = tuple(int((outcome.num_accepted > k).sum()) for k in range(outcome.block_size))
    return Trial(
        label=label,
        cause=next(iter(changes), "fits"),
        settings=reading.settings(config),
        num_reached=(len(outcome.num_accepted), *accepted[:-1]),
        num_accepted=accepted,
        gain=None if gain is None else round(gain.mean, 4),
        gain_error=None if gain is None or gain.error == float("inf") else round(gain.error, 4),
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
