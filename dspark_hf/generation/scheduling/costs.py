"""What rounds cost: a profile measured beforehand, or what this process has seen of its own rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

from dspark_hf.generation.scheduling.interface import Batch, Outcome
from dspark_hf.profiling.fitting import fit_line, smooth_curve

# rounds of a shape whose median counts: many, since only what they have in common with earlier ones must stay
_NUM_SAMPLES = 127
# rounds whose median is the common factor: as many as a slow moment lasts
_NUM_RECENT = 7
# batches so many times larger or smaller cost alike enough to go by
_NEAR = 2
# samples of a shape that count as much as what all shapes together say
_TRUST = 4.0
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
    """Costs measured while decoding: medians of the latest rounds of every shape, smoothed.

    Rounds are few and machines moody, so what is known of one shape also says something of others: costs lie near a
    profile if there is one, else near a line, over tokens for a pass and over drafts for the drafter, and never fall.
    All times are kept relative to a common factor that follows the machine, so that a shape that was last seen at
    another load, or on a shorter context, is still comparable.

    Args:
        profile: what was measured beforehand, if anything.
    """

    def __init__(self, profile: Costs | None = None) -> None:
        self.profile = profile
        self._verify = _Times()
        self._draft = _Times()
        self._recent: deque[float] = deque(maxlen=_NUM_RECENT)
        self._drift = 1.0

    def knows(self, num_rows: int) -> bool:
        """Return whether there is a profile, or plain and drafting rounds of about so many rows were measured."""
        if self.profile is not None:
            return True
        near = [rows for rows in self._verify.rows if num_rows / _NEAR <= rows <= num_rows * _NEAR]
        sizes = {size for rows in near for size in self._verify.sizes(rows)}
        return 1 in sizes and len(sizes) > 1 and bool(self._draft.rows)

    def observe(self, outcome: Outcome) -> None:
        """Learn from a round."""
        rows, drafts, width = outcome.batch.num_rows, outcome.num_drafted, outcome.width
        known = self._verify.median(rows, width)
        if known is None and self.profile is not None:
            known = self.profile.verify_seconds(rows, width, outcome.batch.context_length)
        if known is not None:
            self._recent.append(outcome.other_seconds / max(known, 1e-9))
            self._drift = median(self._recent)
        self._verify.add(rows, width, outcome.other_seconds / self._drift)
        if drafts and outcome.is_typical:
            self._draft.add(rows, drafts, outcome.draft_seconds / self._drift)
        elif drafts:
            self._draft.pass_over(drafts)

    def verify_seconds(self, num_rows: int, width: int, context_length: int) -> float:
        """Return the seconds of a pass over `width` tokens of each row, with all that goes with it."""
        nearest = num_rows if self.profile is not None else self._verify.nearest_rows(num_rows)
        largest = max(self._verify.largest(num_rows), self._verify.largest(nearest))
        widths = range(1, max(width, largest) + 1)
        if self.profile is not None:
            expected = [self.profile.verify_seconds(num_rows, one, context_length) for one in widths]
        else:
            expected = self._expected_verify(num_rows, len(widths))
        return self._drift * self._verify.smoothed(num_rows, expected)[width - 1]

    def _expected_verify(self, num_rows: int, up_to: int) -> list[float]:
        # what counts most is the number of tokens, whichever rows they are of
        intercept, slope = self._verify.line_over_products()
        line = [intercept + slope * num_rows * width for width in range(1, up_to + 1)]
        nearest = self._verify.nearest_rows(num_rows)
        if nearest == num_rows:
            return line
        # and then what is special about widths, as batches of another size show it
        theirs = [intercept + slope * nearest * width for width in range(1, up_to + 1)]
        smoothed = self._verify.smoothed(nearest, theirs)
        return [ours * seconds / other for ours, seconds, other in zip(line, smoothed, theirs, strict=True)]

    def draft_seconds(self, num_rows: int, num_drafts: int, context_length: int) -> float:
        """Return the seconds that the drafter takes for `num_drafts` drafts of each row."""
        if self.profile is not None:
            counts = range(1, max(num_drafts, self._draft.largest(num_rows)) + 1)
            expected = [self.profile.draft_seconds(num_rows, one, context_length) for one in counts]
            return self._drift * self._draft.smoothed(num_rows, expected)[num_drafts - 1]
        nearest = self._draft.nearest_rows(num_rows)
        # rows share the drafter's weights, and add their own work
        scale = 1.0 if nearest == num_rows else 0.5 + 0.5 * num_rows / nearest
        intercept, slope = self._draft.line(nearest, start=_FIXED_SHARE)
        counts = range(1, max(num_drafts, self._draft.largest(nearest)) + 1)
        expected = [intercept + slope * one for one in counts]
        return self._drift * scale * self._draft.smoothed(nearest, expected)[num_drafts - 1]


class _Times:
    """Seconds by number of rows and size of a step, the latest ones of each."""

    def __init__(self) -> None:
        self._samples: dict[int, dict[int, deque[float]]] = {}
        self._medians: dict[tuple[int, int], float] = {}
        self._line: tuple[float, float] | None = None
        self._seen: set[int] = set()

    @property
    def rows(self) -> list[int]:
        """The numbers of rows that were measured."""
        return list(self._samples)

    def sizes(self, rows: int) -> list[int]:
        """Return the sizes that were measured with that many rows."""
        return list(self._samples.get(rows, {}))

    def add(self, rows: int, size: int, seconds: float) -> None:
        """Add a sample; the first of a size, which also pays for choosing kernels and making room, is left out."""
        if size in self._seen:
            self._samples.setdefault(rows, {}).setdefault(size, deque(maxlen=_NUM_SAMPLES)).append(seconds)
            self._medians.pop((rows, size), None)
            self._line = None
        self.pass_over(size)

    def pass_over(self, size: int) -> None:
        """Note that a step of that size was made, and do not count it."""
        self._seen.add(size)

    def median(self, rows: int, size: int) -> float | None:
        """Return the median, or None if there is no sample."""
        samples = self._samples.get(rows, {}).get(size)
        if samples and (rows, size) not in self._medians:
            self._medians[rows, size] = median(samples)
        return self._medians.get((rows, size))

    def nearest_rows(self, rows: int) -> int:
        """Return the measured number of rows that is nearest to `rows`."""
        return min(self._samples, key=lambda one: abs(one - rows))

    def line(self, rows: int, *, start: float) -> tuple[float, float]:
        """Return the line through a number of rows' medians; through a single one, from `start` of it at size 0."""
        medians, counts = self._curve(rows)
        if len(medians) > 1:
            return fit_line(medians, counts)
        [(size, seconds)] = medians.items()
        return start * seconds, (1 - start) * seconds / size

    def line_over_products(self) -> tuple[float, float]:
        """Return the line over rows times size through all medians."""
        # a plan asks for it once per width
        if self._line is None:
            self._line = self._fitted_over_products()
        return self._line

    def _fitted_over_products(self) -> tuple[float, float]:
        points: dict[int, float] = {}
        weights: dict[int, float] = {}
        for rows in self._samples:
            medians, counts = self._curve(rows)
            for size, seconds in medians.items():
                place, old = rows * size, weights.get(rows * size, 0.0)
                points[place] = (points.get(place, 0.0) * old + seconds * counts[size]) / (old + counts[size])
                weights[place] = old + counts[size]
        return fit_line(points, weights)

    def largest(self, rows: int) -> int:
        """Return the largest size that was measured with that many rows, or 0."""
        return max(self._samples.get(rows, {}), default=0)

    def smoothed(self, rows: int, expected: Sequence[float]) -> list[float]:
        """Return the seconds of sizes 1, 2 and so on, from the medians of that many rows and what is `expected`."""
        medians, counts = self._curve(rows)
        return smooth_curve(medians, counts, expected, trust=_TRUST)

    def _curve(self, rows: int) -> tuple[dict[int, float], dict[int, float]]:
        medians: dict[int, float] = {}
        counts: dict[int, float] = {}
        for size, samples in self._samples.get(rows, {}).items():
            seconds = self.median(rows, size)
            if seconds is not None:
                medians[size], counts[size] = seconds, len(samples)
        return medians, counts
