"""The cost curve as a figure (extra `eval`)."""

from __future__ import annotations

from typing import Any

from dspark_hf.figures import COLORS, GREY, STYLE, check_plotting, name_colors, name_figure, new_figure, to_png
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable
from dspark_hf.profiling.break_even import break_even


def draw_costs(table: CostTable, title: str) -> bytes:
    """Return a PNG: milliseconds and relative cost of a pass by its width, and the drafter's milliseconds if known,
    and then the tau from which drafting pays.

    A line is a number of rows, solid on the shortest context and dashed on the longest.

    Raises:
        ValueError: if matplotlib is missing.
    """
    check_plotting()
    import matplotlib

    rows = sorted({count for count, _, _ in table.verify.points})
    with matplotlib.rc_context(STYLE):
        has_drafter = bool(table.draft.points)
        num_panels = 4 if has_drafter else 2
        figure = new_figure(0.8 + 3.4 * num_panels, 4.2)
        panels = figure.subplots(1, num_panels)
        _draw(panels[0], table.verify, rows)
        panels[0].set(title="Target", xlabel="width, tokens per row", ylabel="ms per pass")
        _draw(panels[1], table.verify, rows, is_relative=True)
        panels[1].set(title="Relative to one token", xlabel="width, tokens per row", ylabel="times a pass of width 1")
        if has_drafter:
            _draw(panels[2], table.draft, rows)
            panels[2].set(title="Drafter", xlabel="drafts", ylabel="ms per block")
            _draw_break_even(panels[3], table, rows)
        name_colors(figure, ["1 row" if count == 1 else f"{count} rows" for count in rows])
        contexts = sorted({context for _, context, _ in table.verify.points})
        told = f"context {contexts[0]:,}"
        if len(contexts) > 1:
            told = f"context {contexts[0]:,} (solid) and {contexts[-1]:,} (dashed)"
        name_figure(figure, f"{title}; {told}")
        return to_png(figure)


def _draw_break_even(axes: Any, table: CostTable, all_rows: list[int]) -> None:
    """Draw the tau from which drafting pays on the shortest context, and the most that so many drafts can yield."""
    from matplotlib.ticker import MaxNLocator

    context, most = min(context for _, context, _ in table.draft.points), 1
    for index, rows in enumerate(all_rows):
        taus = break_even(table, rows, context)
        if taus:
            most = max(most, *taus)
            axes.plot(
                list(taus), list(taus.values()), "-o", color=COLORS[index % len(COLORS)], linewidth=2, markersize=4
            )
    axes.plot([0, most], [1, 1 + most], color=GREY, linewidth=1)
    axes.text(0.04, 0.96, "grey: every draft accepted", transform=axes.transAxes, va="top", color=GREY, fontsize=9)
    axes.set(title="Drafting pays above", xlabel="drafts", ylabel="tau, tokens per round", xlim=(0, None))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw(axes: Any, curves: CostCurves, all_rows: list[int], *, is_relative: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    points = curves.points
    contexts = sorted({context for _, context, _ in points})
    for index, rows in enumerate(all_rows):
        for context in dict.fromkeys((contexts[0], contexts[-1])):
            line = {size: seconds for (*shape, size), seconds in points.items() if tuple(shape) == (rows, context)}
            if not line:
                continue
            sizes = sorted(line)
            unit = line[sizes[0]] if is_relative else 1e-3
            style = "-o" if context == contexts[0] else "--o"
            values = [line[size] / unit for size in sizes]
            axes.plot(sizes, values, style, color=COLORS[index % len(COLORS)], linewidth=2, markersize=4)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
