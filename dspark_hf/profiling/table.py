"""The costs of a target and its drafter on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dspark_hf.profiling.interpolation import interpolate

# (rows, context length, size), the size being a pass's width or a number of drafts
Point = tuple[int, int, int]


class CostCurves:
    """Seconds by rows, context length and size; the measured points need not form a full grid."""

    def __init__(self, seconds: Mapping[Point, float]):
        self._curves: dict[int, dict[int, dict[int, float]]] = {}
        for (rows, context, size), one in seconds.items():
            self._curves.setdefault(rows, {}).setdefault(context, {})[size] = one

    @property
    def points(self) -> dict[Point, float]:
        """What was measured."""
        return {
            (rows, context, size): seconds
            for rows, by_context in self._curves.items()
            for context, by_size in by_context.items()
            for size, seconds in by_size.items()
        }

    def at(self, num_rows: int, context_length: int, size: int) -> float:
        """Return the seconds of a step, on straight lines between measured ones: by size, then context, then rows."""
        by_rows = {
            rows: interpolate({context: interpolate(curve, size) for context, curve in curves.items()}, context_length)
            for rows, curves in self._nearest(num_rows).items()
        }
        return interpolate(by_rows, num_rows)

    def _nearest(self, num_rows: int) -> dict[int, dict[int, dict[int, float]]]:
        """Return the curves that matter for a number of rows: the one below, the one above."""
        if num_rows in self._curves:
            return {num_rows: self._curves[num_rows]}
        below = sorted(rows for rows in self._curves if rows < num_rows)
        above = sorted(rows for rows in self._curves if rows > num_rows)
        chosen = below[-1:] + above[:1] if above else below[-2:]
        return {rows: self._curves[rows] for rows in chosen}

    def covers(self, num_rows: int, size: int) -> bool:
        """Return whether a step of that size lies within what was measured, so that nothing need be extended."""
        rows = [one for one in self._curves if one >= num_rows]
        return any(max(curve) >= size for one in rows for curve in self._curves[one].values())


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

    def covers(self, num_rows: int, num_drafts: int) -> bool:
        """Return whether rounds of that size lie within what was measured."""
        return self.verify.covers(num_rows, 1 + num_drafts) and self.draft.covers(num_rows, num_drafts)

    def merged_with(self, newer: CostTable) -> CostTable:
        """Return the measurements of both, the newer ones where both have one."""
        return CostTable(
            CostCurves({**self.verify.points, **newer.verify.points}),
            CostCurves({**self.draft.points, **newer.draft.points}),
        )
