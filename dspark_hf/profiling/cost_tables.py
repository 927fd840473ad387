"""Costs in the terminal."""

from __future__ import annotations

from rich.console import Console

from dspark_hf.console import print_table
from dspark_hf.generation.scheduling.costs.table import CostCurves, CostTable
from dspark_hf.profiling.break_even import break_even


def print_costs(table: CostTable, console: Console) -> None:
    """Print a table per context length: milliseconds by size and rows, those of passes also relative to one token."""
    for context in _contexts(table.verify):
        title = f"Target, {context:,} tokens of context: ms per pass, and times a pass of width 1"
        _print(console, title, "width", table.verify, context, is_relative=True)
    for context in _contexts(table.draft):
        _print(console, f"Drafter, {context:,} tokens of context: ms per block", "drafts", table.draft, context)
    for context in _contexts(table.draft):
        _print_break_even(console, table, context)


def _contexts(curves: CostCurves) -> list[int]:
    return sorted({context for _, context, _ in curves.points})


def _print(
    console: Console, title: str, size_name: str, curves: CostCurves, context: int, *, is_relative: bool = False
) -> None:
    seconds = {(rows, size): cost for (rows, other, size), cost in curves.points.items() if other == context}
    all_rows, sizes = (sorted({pair[index] for pair in seconds}) for index in (0, 1))
    table = []
    for size in sizes:
        cells = []
        for rows in all_rows:
            cost, least = seconds.get((rows, size)), seconds.get((rows, sizes[0]))
            cell = "" if cost is None else f"{1e3 * cost:.2f}"
            cells.append(f"{cell} {cost / least:5.2f}x" if is_relative and cost and least else cell)
        table.append((str(size), *cells))
    headings = (size_name, *map(_rows, all_rows))
    print_table(console, title, headings, table)


def _print_break_even(console: Console, table: CostTable, context: int) -> None:
    all_rows = sorted({rows for rows, other, _ in table.draft.points if other == context})
    taus = {rows: break_even(table, rows, context) for rows in all_rows}
    counts = sorted({count for by_count in taus.values() for count in by_count})
    if counts:
        cells = [
            (str(count), *(f"{taus[rows][count]:.2f}" if count in taus[rows] else "" for rows in all_rows))
            for count in counts
        ]
        title = f"Drafting pays from this tau on (tokens per round), {context:,} tokens of context"
        print_table(console, title, ("drafts", *map(_rows, all_rows)), cells)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
