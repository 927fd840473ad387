"""The files of an evaluation."""

from __future__ import annotations

from pathlib import Path

from dspark_hf.evaluation.plots import draw_figures
from dspark_hf.evaluation.report import render_report
from dspark_hf.evaluation.results import Evaluation, to_json
from dspark_hf.files import write_whole


def write_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write `evaluation.json`, the figures as PNG and `report.html`. Returns their paths, the page last.

    Each file is written whole or not at all; the numbers come first, so that they survive a failure to draw.

    Raises:
        ValueError: if matplotlib is missing; the numbers are written all the same.
    """
    paths = [folder / "evaluation.json"]
    # half a character in an argument becomes JSON's own escape
    write_whole(paths[0], to_json(evaluation).encode(errors="backslashreplace"))
    figures = draw_figures(evaluation)
    for figure in figures:
        paths.append(folder / f"{figure.name}.png")
        write_whole(paths[-1], figure.png)
    paths.append(folder / "report.html")
    write_whole(paths[-1], render_report(evaluation, figures).encode(errors="replace"))
    return paths
