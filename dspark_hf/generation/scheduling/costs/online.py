"""What rounds cost: a profile measured beforehand, or what this process has seen of its own rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

from dspark_hf.generation.scheduling.costs.curves import bend_at, find_bends, fit_line
from dspark_hf.generation.scheduling.defaults import (
    FEW_SAMPLES,
    FIXED_SHARE,
    LEAST_SHARE,
    NEAR,
    NUM_MOMENT,
    NUM_SAMPLES,
    TRUST,
)
from dspark_hf.generation.scheduling.interface import Batch, Outcome
from dspark_hf.generation.scheduling.locking import in_turns


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
    profile if there is one, else near a line, over tokens for a pass and over drafts for the drafter. Curves may fall:
    kernels work in tiles, and a pass over sixteen tokens can be quicker than one over twelve.
    All times are kept relative to a common factor that follows the machine, so that a shape that was last seen at
    another load, or on a shorter context, is still comparable. What decisions hang on is how rounds compare with plain
    steps: but for the first few, rounds count only close behind plain steps of as many rows, and by what those took.
    Rounds that were compared with their like alone would keep a wrong ratio, as from a slow moment, for ever.

    Args:
        profile: what was measured beforehand, if anything.
    """

    def __init__(self, profile: Costs | None = None) -> None:
        self.profile = profile
        self._verify = _Times()
        self._draft = _Times()
        # rows, width, and the time against the known one
        self._recent: deque[tuple[int, int, float]] = deque(maxlen=NUM_MOMENT)

    def beside(self, profile: Costs | None) -> OnlineCosts:
        """Return these costs beside another profile; what one of them learns, both know."""
        other = OnlineCosts(profile)
        other._verify, other._draft, other._recent = self._verify, self._draft, self._recent
        return other

    @property
    def _drift(self) -> float:
        return median(factor for _, _, factor in self._recent) if self._recent else 1.0

    @in_turns
    def knows(self, num_rows: int) -> bool:
        """Return whether there is a profile, or plain and drafting rounds of about so many rows were measured."""
        if self.profile is not None:
            return True
        near = [rows for rows in self._verify.rows if num_rows / NEAR <= rows <= num_rows * NEAR]
        sizes = {size for rows in near for size in self._verify.sizes(rows)}
        return 1 in sizes and len(sizes) > 1 and bool(self._draft.rows)

    @in_turns
    def observe(self, outcome: Outcome) -> None:
        """Learn from a round."""
        rows, drafts, width = outcome.batch.num_rows, outcome.num_drafted, outcome.width
        known = self._verify.median(rows, width)
        if known is None and self.profile is not None:
            known = self.profile.verify_seconds(rows, width, outcome.batch.context_length)
        plain = [factor for *shape, factor in self._recent if shape == [rows, 1]]
        if known is not None:
            self._recent.append((rows, width, outcome.other_seconds / max(known, 1e-9)))
        if known is not None and width == 1:
            # the measure of all others
            self._verify.add(rows, width, known)
        elif plain or self._verify.count(rows, width) < FEW_SAMPLES:
            self._verify.add(rows, width, outcome.other_seconds / (median(plain) if plain else self._drift))
        if drafts and not outcome.is_typical:
            self._draft.pass_over(drafts)
        elif drafts and (plain or self._draft.count(rows, drafts) < FEW_SAMPLES):
            self._draft.add(rows, drafts, outcome.draft_seconds / (median(plain) if plain else self._drift))

    @in_turns
    def verify_seconds(self, num_rows: int, width: int, context_length: int) -> float:
        """Return the seconds of a pass over `width` tokens of each row, with all that goes with it."""

        def expected(one: int) -> float:
            if self.profile is not None:
                return self.profile.verify_seconds(num_rows, one, context_length)
            return self._verify.told_by_others(num_rows, one)

        return self._drift * self._verify.bent(num_rows, width, expected)

    @in_turns
    def draft_seconds(self, num_rows: int, num_drafts: int, context_length: int) -> float:
        """Return the seconds that the drafter takes for `num_drafts` drafts of each row."""
        if (profile := self.profile) is not None:
            return self._drift * self._draft.bent(
                num_rows, num_drafts, lambda one: profile.draft_seconds(num_rows, one, context_length)
            )
        nearest = self._draft.nearest_rows(num_rows)
        # rows share the drafter's weights, and add their own work
        scale = 1.0 if nearest == num_rows else FIXED_SHARE + (1 - FIXED_SHARE) * num_rows / nearest
        intercept, slope = self._draft.line(nearest, start=FIXED_SHARE)
        return self._drift * scale * self._draft.bent(nearest, num_drafts, lambda one: intercept + slope * one)


class _Times:
    """Seconds by number of rows and size of a step, the latest ones of each."""

    def __init__(self) -> None:
        self._samples: dict[int, dict[int, deque[float]]] = {}
        self._medians: dict[tuple[int, int], float] = {}
        self._line: tuple[float, float] | None = None
        self._other_bends: dict[int, dict[int, float]] = {}
        self._floor: float | None = None
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
            self._samples.setdefault(rows, {}).setdefault(size, deque(maxlen=NUM_SAMPLES)).append(seconds)
            self._medians.pop((rows, size), None)
            # a plan asks for these once per width
            self._line = None
            self._other_bends.clear()
            self._floor = None
        self.pass_over(size)

    def pass_over(self, size: int) -> None:
        """Note that a step of that size was made, and do not count it."""
        self._seen.add(size)

    def count(self, rows: int, size: int) -> int:
        """Return the number of samples."""
        return len(self._samples.get(rows, {}).get(size, ()))

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

    def told_by_others(self, rows: int, size: int) -> float:
        """Return what steps of other numbers of rows say: what counts most is the number of tokens of a step."""
        if self._line is None:
            points, weights = self._over_products(list(self._samples))
            self._line = fit_line(points, weights)
        intercept, slope = self._line
        if rows not in self._other_bends:
            points, weights = self._over_products([other for other in self._samples if other != rows])
            self._other_bends[rows] = find_bends(points, weights, lambda one: intercept + slope * one, trust=TRUST)
        value = intercept + slope * rows * size + bend_at(self._other_bends[rows], rows * size)
        return max(value, self._least())

    def _least(self) -> float:
        if self._floor is None:
            medians = [self._curve(rows)[0].values() for rows in self._samples]
            self._floor = LEAST_SHARE * min((seconds for of_rows in medians for seconds in of_rows), default=0.0)
        return self._floor

    def _over_products(self, chosen: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
        """Return the medians of the chosen numbers of rows by rows times size, and their weights."""
        points: dict[int, float] = {}
        weights: dict[int, float] = {}
        for rows in chosen:
            medians, counts = self._curve(rows)
            for size, seconds in medians.items():
                place, old = rows * size, weights.get(rows * size, 0.0)
                points[place] = (points.get(place, 0.0) * old + seconds * counts[size]) / (old + counts[size])
                weights[place] = old + counts[size]
        return points, weights

    def bent(self, rows: int, size: int, expected: Callable[[int], float]) -> float:
        """Return the seconds of a size: what is `expected`, bent towards the medians of that many rows."""
        medians, counts = self._curve(rows)
        value = expected(size) + bend_at(find_bends(medians, counts, expected, trust=TRUST), size)
        return max(value, self._least())

    def _curve(self, rows: int) -> tuple[dict[int, float], dict[int, float]]:
        medians: dict[int, float] = {}
        counts: dict[int, float] = {}
        for size, samples in self._samples.get(rows, {}).items():
            seconds = self.median(rows, size)
            if seconds is not None:
                medians[size], counts[size] = seconds, len(samples)
        return medians, counts
