"""An evaluation in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dspark_hf.evaluation.results import Evaluation
from dspark_hf.evaluation.tables import (
    TextTable,
    acceptance_table,
    headline,
    position_table,
    reliability_table,
    remarks,
    speed_table,
)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the tables, all but the long one of thresholds, and the headline."""
    for make in (acceptance_table, position_table, speed_table, reliability_table):
        table = make(evaluation)
        if table.rows:
            console.print(_render(table))
            console.print(Text(table.explanation, style="dim"), "")
    console.print(Text(headline(evaluation), style="bold"))
    for remark in remarks(evaluation):
        console.print(Text(remark, style="yellow"))


def _render(table: TextTable) -> Table:
    # labels below one another in one column: names are long, terminals are not
    rendered = Table(title=Text(table.title), title_justify="left", show_lines=table.num_labels > 1)
    rendered.add_column(Text("\n".join(table.headings[: table.num_labels])), overflow="fold")
    for heading in table.headings[table.num_labels :]:
        rendered.add_column(Text(heading), justify="right", no_wrap=True)
    for row in table.rows:
        labels, cells = row[: table.num_labels], row[table.num_labels :]
        rendered.add_row(Text("\n".join(labels)), *(Text(cell) for cell in cells))
    return rendered
