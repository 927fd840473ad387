"""Costs in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable


def print_costs(table: CostTable, console: Console) -> None:
    """Print a table per context length: milliseconds by size and rows, those of passes also relative to one token."""
    for context in _contexts(table.verify):
        console.print(f"Target, {context:,} tokens of context: ms per pass, and how many times a pass of width 1")
        console.print(_render("width", table.verify, context, is_relative=True))
    for context in _contexts(table.draft):
        console.print(f"Drafter, {context:,} tokens of context: ms per block")
        console.print(_render("drafts", table.draft, context))


def _contexts(curves: CostCurves) -> list[int]:
    return sorted({context for _, context, _ in curves.points})


def _render(size_name: str, curves: CostCurves, context: int, *, is_relative: bool = False) -> Table:
    seconds = {(rows, size): cost for (rows, other, size), cost in curves.points.items() if other == context}
    all_rows, sizes = (sorted({pair[index] for pair in seconds}) for index in (0, 1))
    rendered = Table()
    rendered.add_column(size_name, justify="right")
    for rows in all_rows:
        rendered.add_column("1 row" if rows == 1 else f"{rows} rows", justify="right", no_wrap=True)
    for size in sizes:
        cells = []
        for rows in all_rows:
            cost, least = seconds.get((rows, size)), seconds.get((rows, sizes[0]))
            cell = "" if cost is None else f"{1e3 * cost:.2f}"
            cells.append(f"{cell} {cost / least:5.2f}x" if is_relative and cost and least else cell)
        rendered.add_row(str(size), *cells)
    return rendered
