"""An evaluation in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from dspark_hf.console import print_table
from dspark_hf.evaluation.results import Evaluation
from dspark_hf.evaluation.tables import (
    acceptance_table,
    headline,
    position_table,
    recommendation,
    reliability_table,
    remarks,
    speed_table,
)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the tables, all but the long one of thresholds, and the headline."""
    for make in (acceptance_table, position_table, speed_table, reliability_table):
        table = make(evaluation)
        if table.rows:
            print_table(console, table.title, table.headings, table.rows, num_labels=table.num_labels)
            console.print(Text(table.explanation, style="dim"), "")
    console.print(Text(headline(evaluation), style="bold"))
    advice = recommendation(evaluation)
    if advice is not None:
        console.print(Text(advice))
    for remark in remarks(evaluation):
        console.print(Text(remark, style="yellow"))
