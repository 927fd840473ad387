"""What rounds cost: a profile measured beforehand, or what this process has seen of its own rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Protocol

from dspark_hf.generation.scheduling.interface import Batch, Outcome
from dspark_hf.profiling.interpolation import interpolate

# rounds of a shape whose median counts
_NUM_SAMPLES = 15
# rounds of either kind that make the costs known
_NUM_NEEDED = 2
# how fast the common factor follows the machine's mood and the growing context
_DRIFT_RATE = 0.2
# share of the drafter's time that does not depend on the number of drafts: its backbone runs over whole blocks
_FIXED_SHARE = 0.5


class Costs(Protocol):
    """Seconds of a pass of the target and of drafting."""

    def verify_seconds(self, num_rows: int, width: int, context_length: int) -> float:
        """Return the seconds of a pass over `width` tokens of each row."""
        ...

    def draft_seconds(self, num_rows: int, num_drafts: int, context_length: int) -> float:
        """Return the seconds that the drafter takes for `num_drafts` drafts of each row."""
        ...


def round_seconds(costs: Costs, batch: Batch, num_drafts: int) -> Callable[[int], float]:
    """Return the function from levels verified to seconds of a round in which `num_drafts` were drafted."""
    rows, length = batch.num_rows, batch.context_length
    drafting = costs.draft_seconds(rows, num_drafts, length) if num_drafts else 0.0
    return lambda level: drafting + costs.verify_seconds(rows, 1 + level, length)


class OnlineCosts:
    """Costs measured while decoding: medians of the latest rounds of every shape.

    All times are kept relative to a common factor that follows the machine, so that a shape that was last seen at
    another load, or on a shorter context, is still comparable.
    """

    def __init__(self) -> None:
        self._verify: dict[int, dict[int, deque[float]]] = {}
        self._draft: dict[int, dict[int, deque[float]]] = {}
        self._seen: set[tuple[int, int, int]] = set()
        self._drift = 1.0

    @property
    def is_known(self) -> bool:
        """Whether both plain and drafting rounds have been measured."""
        num_plain = sum(len(widths[1]) for widths in self._verify.values() if 1 in widths)
        num_drafted = sum(len(times) for drafts in self._draft.values() for times in drafts.values())
        return num_plain >= _NUM_NEEDED and num_drafted >= _NUM_NEEDED

    def observe(self, outcome: Outcome) -> None:
        """Learn from a round."""
        rows, drafts, width = outcome.batch.num_rows, outcome.num_drafted, outcome.width
        shape = (rows, drafts, width)
        if shape not in self._seen:
            # the first pass of a shape also pays for choosing kernels and making room
            self._seen.add(shape)
            return
        if not outcome.is_typical:
            return
        self._follow(rows, width, outcome.other_seconds)
        _store(self._verify, rows, width, outcome.other_seconds / self._drift)
        if drafts:
            _store(self._draft, rows, drafts, outcome.draft_seconds / self._drift)

    def _follow(self, rows: int, width: int, seconds: float) -> None:
        known = self._verify.get(rows, {}).get(width)
        if known:
            ratio = seconds / max(median(known) * self._drift, 1e-9)
            self._drift *= min(max(ratio, 0.5), 2.0) ** _DRIFT_RATE

    def verify_seconds(self, num_rows: int, width: int, context_length: int) -> float:
        """Return the seconds of a pass over `width` tokens of each row, with all that goes with it."""
        own = _medians(self._verify.get(num_rows, {}))
        if 1 in own and len(own) > 1:
            return self._drift * interpolate(own, width)
        # a batch of this size is new: what counts most is the number of tokens
        by_tokens = {
            rows * tokens: seconds
            for rows, widths in self._verify.items()
            for tokens, seconds in _medians(widths).items()
        }
        return self._drift * interpolate({**by_tokens, **{num_rows * w: s for w, s in own.items()}}, num_rows * width)

    def draft_seconds(self, num_rows: int, num_drafts: int, context_length: int) -> float:
        """Return the seconds that the drafter takes for `num_drafts` drafts of each row."""
        nearest = min(self._draft, key=lambda rows: abs(rows - num_rows))
        known = _medians(self._draft[nearest])
        if len(known) == 1:
            [(drafts, seconds)] = known.items()
            known = {0: seconds * _FIXED_SHARE, drafts: seconds}
        # rows share the drafter's weights, and add their own work
        scale = 1.0 if nearest == num_rows else 0.5 + 0.5 * num_rows / nearest
        return self._drift * scale * interpolate(known, num_drafts)


def _store(table: dict[int, dict[int, deque[float]]], rows: int, size: int, seconds: float) -> None:
    table.setdefault(rows, {}).setdefault(size, deque(maxlen=_NUM_SAMPLES)).append(seconds)


def _medians(times: Mapping[int, deque[float]]) -> dict[int, float]:
    return {size: median(samples) for size, samples in times.items()}
