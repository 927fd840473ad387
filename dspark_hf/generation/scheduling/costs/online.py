"""What rounds cost, learned from this process's own rounds, with or without a profile measured beforehand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol

from dspark_hf.generation.locking import locked
from dspark_hf.generation.scheduling.costs.curves import bend_at, find_bends, fit_line
from dspark_hf.generation.scheduling.defaults import (
    DRAFT_SHARE,
    FEW_SAMPLES,
    FIXED_SHARE,
    LEAST_SHARE,
    NEAR,
    NUM_MOMENT,
    NUM_SAMPLES,
    PASS_TILT,
    TILT_TRUST,
    TRUST,
)
from dspark_hf.generation.scheduling.interface import Batch, RoundOutcome


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
    """Costs learned while decoding: for every shape, the smoothed median of its latest rounds.

    A shape is a number of rows and a size. Rounds are few and noisy, so every shape also borrows from the others:
    costs are expected to lie on the profile if there is one, else on a line, over tokens for a pass and over drafts
    for the drafter. How such lines usually rise is what is believed at first. The more rounds of a shape were seen,
    the closer its cost follows them. Curves may fall: kernels work in tiles, and a pass over sixteen tokens can be
    quicker than one over twelve.

    All times are stored relative to the machine's speed of the moment, so that shapes that were seen under different
    loads, or on contexts of different length, can be compared. Decisions depend on how rounds compare with plain
    steps. Therefore, after the first few, a round counts only shortly after plain steps with as many rows, and
    relative to what those took. If rounds were compared only with rounds of their own shape, a ratio that was measured
    in a slow moment would never be corrected.

    Args:
        profile: costs measured beforehand, if any.
    """

    def __init__(self, profile: Costs | None = None) -> None:
        self.profile = profile
        self._verify = _Times(tilt=PASS_TILT)
        self._draft = _Times()
        # rows, width, and the time divided by the known one
        self._recent: deque[tuple[int, int, float]] = deque(maxlen=NUM_MOMENT)

    def with_profile(self, profile: Costs | None) -> OnlineCosts:
        """Return these costs on top of `profile`; what either object learns, both know."""
        other = OnlineCosts(profile)
        other._verify, other._draft, other._recent = self._verify, self._draft, self._recent
        return other

    @property
    def _drift(self) -> float:
        return median(factor for _, _, factor in self._recent) if self._recent else 1.0

    @locked
    def knows(self, num_rows: int) -> bool:
        """Return whether there is a profile, or both plain and drafting rounds of about that many rows were seen."""
        plain = [rows for rows in self._near(self._verify, num_rows) if 1 in self._verify.sizes(rows)]
        return self.profile is not None or bool(plain and self._draft.rows)

    @locked
    def has_timed(self) -> bool:
        """Return whether any pass was timed, or there is a profile: until then, costs are but shares of a pass."""
        return self.profile is not None or bool(self._verify.rows)

    @locked
    def num_drafted(self, num_rows: int) -> float:
        """Return how many drafting rounds of about that many rows were timed; of a profile, more than any doubt."""
        near = self._near(self._draft, num_rows)
        counts = [self._draft.count(rows, size) for rows in near for size in self._draft.sizes(rows)]
        return float("inf") if self.profile is not None else float(sum(counts))

    @locked
    def widest(self, num_rows: int) -> float:
        """Return the most tokens of a row in a pass of about that many rows, or of any width if there is a profile."""
        if self.profile is not None:
            return float("inf")
        return max(
            (size for rows in self._near(self._verify, num_rows) for size in self._verify.sizes(rows)), default=0
        )

    @staticmethod
    def _near(times: _Times, num_rows: int) -> list[int]:
        return [rows for rows in times.rows if num_rows / NEAR <= rows <= num_rows * NEAR]

    @locked
    def observe(self, outcome: RoundOutcome) -> None:
        """Learn from a round."""
        rows, drafts, width = outcome.batch.num_rows, outcome.num_drafted, outcome.width
        known = self._verify.median(rows, width)
        if known is None and self.profile is not None:
            known = self.profile.verify_seconds(rows, width, outcome.batch.context_length)
        plain = [factor for *shape, factor in self._recent if shape == [rows, 1]]
        if known is not None:
            self._recent.append((rows, width, outcome.other_seconds / max(known, 1e-9)))
        if known is not None and width == 1:
            # other rounds are measured against this one, so it must not follow the machine's speed of the moment
            self._verify.add(rows, width, known)
        elif plain or self._verify.count(rows, width) < FEW_SAMPLES:
            self._verify.add(rows, width, outcome.other_seconds / (median(plain) if plain else self._drift))
        if drafts and not outcome.is_typical:
            self._draft.pass_over(drafts)
        elif drafts and (plain or self._draft.count(rows, drafts) < FEW_SAMPLES):
            self._draft.add(rows, drafts, outcome.draft_seconds / (median(plain) if plain else self._drift))

    def verify_seconds(self, num_rows: int, width: int, context_length: int) -> float:
        """Return the seconds of a round with a pass over `width` tokens of each row, without drafting."""
        return self.seconds_of_passes(num_rows, [width], context_length)[0]

    @locked
    def seconds_of_passes(self, num_rows: int, widths: Sequence[int], context_length: int) -> list[float]:
        """Return `verify_seconds` of several widths, which takes little longer than one."""

        def expected(size: int) -> float:
            if self.profile is not None:
                return self.profile.verify_seconds(num_rows, size, context_length)
            return self._verify.predict_from_other_batches(num_rows, size)

        drift = self._drift
        return [drift * seconds for seconds in self._verify.smoothed(num_rows, widths, expected)]

    @locked
    def draft_seconds(self, num_rows: int, num_drafts: int, context_length: int) -> float:
        """Return the seconds that the drafter takes for `num_drafts` drafts of each row."""
        if (profile := self.profile) is not None:
            [seconds] = self._draft.smoothed(
                num_rows, [num_drafts], lambda size: profile.draft_seconds(num_rows, size, context_length)
            )
            return self._drift * seconds
        if not self._draft.rows:
            return DRAFT_SHARE * self.verify_seconds(num_rows, 1, context_length)
        nearest = self._draft.nearest_rows(num_rows)
        # all rows share the reading of the drafter's weights, and each adds its own work
        scale = 1.0 if nearest == num_rows else FIXED_SHARE + (1 - FIXED_SHARE) * num_rows / nearest
        intercept, slope = self._draft.line(nearest, start=FIXED_SHARE)
        [seconds] = self._draft.smoothed(nearest, [num_drafts], lambda size: intercept + slope * size)
        return self._drift * scale * seconds


class _Times:
    """The latest seconds of steps, by number of rows and size.

    Args:
        tilt: what a further token is expected to add, as a share of a step that has none.
    """

    def __init__(self, *, tilt: float = 0.0) -> None:
        self._tilt = tilt
        self._samples: dict[int, dict[int, deque[float]]] = {}
        self._medians: dict[tuple[int, int], float] = {}
        self._curves: dict[int, tuple[dict[int, float], dict[int, float]]] = {}
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
        """Add a sample; the first of a size is left out, since it also pays for choosing kernels and for memory."""
        if size in self._seen:
            self._samples.setdefault(rows, {}).setdefault(size, deque(maxlen=NUM_SAMPLES)).append(seconds)
            self._medians.pop((rows, size), None)
            # these are kept because a plan asks for every width
            self._curves.pop(rows, None)
            self._line = None
            self._other_bends.clear()
            self._floor = None
        self.pass_over(size)

    def pass_over(self, size: int) -> None:
        """Note that a step of that size was made, without counting its time."""
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
        return min(self._samples, key=lambda measured: abs(measured - rows))

    def line(self, rows: int, *, start: float) -> tuple[float, float]:
        """Return intercept and slope of the line through the medians of `rows` rows.

        With a single median, the line starts from the share `start` of it at size 0.
        """
        medians, counts = self._curve(rows)
        if len(medians) > 1:
            return fit_line(medians, counts)
        [(size, seconds)] = medians.items()
        return start * seconds, (1 - start) * seconds / size

    def predict_from_other_batches(self, rows: int, size: int) -> float:
        """Return the seconds that batches of other sizes suggest: mainly, the number of tokens of a step counts."""
        if self._line is None:
            points, weights = self._over_products(list(self._samples))
            # a share of a pass, as long as there is nothing to go by
            known = fit_line(points, weights, tilt=self._tilt, trust=TILT_TRUST) if points else (1.0, self._tilt)
            self._line = known
        intercept, slope = self._line
        if rows not in self._other_bends:
            points, weights = self._over_products([other for other in self._samples if other != rows])
            self._other_bends[rows] = find_bends(
                points, weights, lambda tokens: intercept + slope * tokens, trust=TRUST
            )
        value = intercept + slope * rows * size + bend_at(self._other_bends[rows], rows * size)
        return max(value, self._least())

    def _least(self) -> float:
        if self._floor is None:
            medians = [self._curve(rows)[0].values() for rows in self._samples]
            self._floor = LEAST_SHARE * min((seconds for of_rows in medians for seconds in of_rows), default=0.0)
        return self._floor

    def _over_products(self, chosen: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
        """Return the medians of the chosen numbers of rows, by number of tokens, and their weights."""
        points: dict[int, float] = {}
        weights: dict[int, float] = {}
        for rows in chosen:
            medians, counts = self._curve(rows)
            for size, seconds in medians.items():
                place, old = rows * size, weights.get(rows * size, 0.0)
                points[place] = (points.get(place, 0.0) * old + seconds * counts[size]) / (old + counts[size])
                weights[place] = old + counts[size]
        return points, weights

    def smoothed(self, rows: int, sizes: Sequence[int], expected: Callable[[int], float]) -> list[float]:
        """Return the seconds of every size: the `expected` ones, moved towards the medians of that many rows."""
        bends = find_bends(*self._curve(rows), expected, trust=TRUST)
        least = self._least()
        return [max(expected(size) + bend_at(bends, size), least) for size in sizes]

    def _curve(self, rows: int) -> tuple[dict[int, float], dict[int, float]]:
        """Return the medians of that many rows by size, and the number of samples of each."""
        if rows not in self._curves:
            samples = self._samples.get(rows, {})
            medians = {size: self.median(rows, size) for size in samples}
            known = {size: seconds for size, seconds in medians.items() if seconds is not None}
            self._curves[rows] = known, {size: float(len(samples[size])) for size in known}
        return self._curves[rows]
