"""The costs of a target and its drafter on one machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dspark_hf.generation.scheduling.costs.curves import deciding_places, interpolate

# (rows, context length, size), the size being a pass's width or a number of drafts
Point = tuple[int, int, int]

# contexts up to this many times longer or shorter than a measured one are covered by it
_REACH = 4
# A step that costs less than this share of a smaller one was measured on a busy machine. Real costs fall as well,
# where kernels work in tiles: to 0.53 at most in benchmarks/results, for two rows of Gemma 3 270M.
_LEAST_FALL = 0.5


class CostCurves:
    """Seconds by rows, context length and size; the measured points need not form a full grid.

    Raises:
        ValueError: if a cost is not a finite positive number.
    """

    def __init__(self, seconds: Mapping[Point, float]):
        self._curves: dict[int, dict[int, dict[int, float]]] = {}
        for (rows, context, size), cost in seconds.items():
            if not (math.isfinite(cost) and cost > 0):
                raise ValueError(
                    f"`seconds` must be finite and positive, got {cost} for {rows} x {size} tokens. Measure again."
                )
            self._curves.setdefault(rows, {}).setdefault(context, {})[size] = cost

    @property
    def points(self) -> dict[Point, float]:
        """What was measured."""
        return {
            (rows, context, size): seconds
            for rows, by_context in self._curves.items()
            for context, by_size in by_context.items()
            for size, seconds in by_size.items()
        }

    @property
    def doubt(self) -> str | None:
        """Which costs cannot be true since they fall too far as steps grow, in words, or None."""
        for rows, by_context in self._curves.items():
            for curve in by_context.values():
                for size in curve:
                    least = min((other for other in curve if other > size), key=curve.__getitem__, default=size)
                    if curve[least] < _LEAST_FALL * curve[size]:
                        found, smaller = (f"{1e3 * curve[at]:.3g} ms for {rows} x {at}" for at in (least, size))
                        return f"{found} tokens, but {smaller}"
        return None

    def without_doubt(self) -> CostCurves:
        """Return these costs with those lowered that cannot be true: disturbances only ever add."""
        points = self.points
        for rows, context, size in sorted(points, reverse=True):
            wider = [cost for point, cost in points.items() if point[:2] == (rows, context) and point[2] > size]
            least = min(wider, default=math.inf)
            if least < _LEAST_FALL * points[rows, context, size]:
                points[rows, context, size] = least
        return CostCurves(points)

    def at(self, num_rows: int, context_length: int, size: int) -> float:
        """Return the seconds of a step, on straight lines between measured ones: by size, then context, then rows."""
        by_rows = {
            rows: interpolate(
                {context: interpolate(curve, size) for context, curve in self._curves[rows].items()}, context_length
            )
            for rows in deciding_places(self._curves, num_rows)
        }
        return interpolate(by_rows, num_rows)

    def covers(self, num_rows: int, context_length: int, size: int) -> bool:
        """Return whether steps up to that size, and up to as many rows, lie within what was measured.

        Contexts may lie a little outside.
        """
        enough = [rows for rows, curves in self._curves.items() if _reaches(curves, context_length, size)]
        return any(rows <= num_rows for rows in enough) and any(rows >= num_rows for rows in enough)


def _reaches(curves: Mapping[int, Mapping[int, float]], context_length: int, size: int) -> bool:
    contexts = [context for context, curve in curves.items() if min(curve) == 1 and max(curve) >= size]
    return bool(contexts) and min(contexts) <= _REACH * context_length and context_length <= _REACH * max(contexts)


@dataclass(frozen=True)
class CostTable:
    """What a pass of the target and a block of drafts cost.

    Args:
        verify: seconds by rows, context length and width.
        draft: seconds by rows, context length and number of drafts, for one drafter; may be empty.
    """

    verify: CostCurves
    draft: CostCurves = field(default_factory=lambda: CostCurves({}))

    def verify_seconds(self, num_rows: int, width: int, context_length: int) -> float:
        """Return the seconds of a pass over `width` tokens of each row."""
        return self.verify.at(num_rows, context_length, width)

    def draft_seconds(self, num_rows: int, num_drafts: int, context_length: int) -> float:
        """Return the seconds that the drafter takes for `num_drafts` drafts of each row."""
        return self.draft.at(num_rows, context_length, num_drafts)

    def covers(self, num_rows: int, num_drafts: int, context_length: int) -> bool:
        """Return whether rounds up to that size lie within what was measured."""
        return self.verify.covers(num_rows, context_length, 1 + num_drafts) and self.draft.covers(
            num_rows, context_length, num_drafts
        )

    @property
    def doubt(self) -> str | None:
        """Which costs cannot be true, in words, or None."""
        return self.verify.doubt or self.draft.doubt

    def without_doubt(self) -> CostTable:
        """Return this table with those costs lowered that cannot be true."""
        return CostTable(self.verify.without_doubt(), self.draft.without_doubt())

    def merged_with(self, preferred: CostTable) -> CostTable:
        """Return the measurements of both, the preferred ones where both have one."""
        return CostTable(
            CostCurves({**self.verify.points, **preferred.verify.points}),
            CostCurves({**self.draft.points, **preferred.draft.points}),
        )
