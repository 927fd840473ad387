"""From which accepted length on drafting pays."""

from __future__ import annotations

from dspark_hf.generation.scheduling.costs.table import CostTable


def break_even(table: CostTable, rows: int, context: int) -> dict[int, float]:
    """Return the tau at which a round is as fast as plain steps, by its number of drafts, where both were measured.

    A round that yields tau tokens replaces tau plain steps: it pays where tau is above the time of drafting and of the
    wider pass together, in plain steps.

    Example:

        >>> from dspark_hf.generation.scheduling.costs.table import CostCurves
        >>> passes = CostCurves({(1, 128, 1): 0.5, (1, 128, 4): 0.75})
        >>> break_even(CostTable(passes, CostCurves({(1, 128, 3): 0.125})), rows=1, context=128)
        {3: 1.75}
    """
    passes, blocks = table.verify.points, table.draft.points
    plain = passes.get((rows, context, 1))
    if plain is None:
        return {}
    return {
        count: (seconds + passes[rows, context, 1 + count]) / plain
        for (row_count, other, count), seconds in sorted(blocks.items())
        if (row_count, other) == (rows, context) and (rows, context, 1 + count) in passes
    }
