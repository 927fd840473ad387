"""The costs of a target and its drafter on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dspark_hf.generation.scheduling.costs.curves import deciding_places, interpolate

# (rows, context length, size), the size being a pass's width or a number of drafts
Point = tuple[int, int, int]

# how many times longer or shorter than measured ones contexts may be for their costs to be told
_REACH = 4


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

    def merged_with(self, preferred: CostTable) -> CostTable:
        """Return the measurements of both, the preferred ones where both have one."""
        return CostTable(
            CostCurves({**self.verify.points, **preferred.verify.points}),
            CostCurves({**self.draft.points, **preferred.draft.points}),
        )
