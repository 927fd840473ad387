"""How training runs learn, side by side: held-out tau by step, and how often each draft is accepted at the end.

    python -m benchmarks.curves runs/vanilla runs/none --output benchmarks/results/markov.md --title "The Markov head"

Takes folders of `dspark-hf train` on the same text with the same seed, so that they hold out the same conversations;
every other run is compared with the last one. Nothing is trained or timed here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.pages import FOLDER, write_page
from benchmarks.provenance import describe_run
from dspark_hf.modeling.card import TRAINING_LOG

TAU, RATE = "eval_expected_tau", "eval_accept_rate_"


def read_log(run: Path) -> dict[int, dict[str, Any]]:
    """Return a run's evaluations by step.

    Raises:
        typer.BadParameter: if it has none.
    """
    path = run / "drafter" / TRAINING_LOG
    if not path.is_file():
        raise typer.BadParameter(f"must be folders of finished training runs, and there is no {path}.")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["step"]: record for record in records}


def tau_table(logs: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Return the held-out tau of all runs at every step that all were evaluated at."""
    *others, base = logs
    steps = sorted(set.intersection(*(set(log) for log in logs.values())))
    lines = [_row("step", *logs, *(f"{name} / {base}" for name in others)), _rule(len(logs) + len(others))]
    for step in steps:
        taus = {name: log[step][TAU] for name, log in logs.items()}
        gains = [f"{taus[name] / taus[base] - 1:+.1%}" for name in others]
        lines.append(_row(str(step), *(f"{tau:.3f}" for tau in taus.values()), *gains))
    return lines


def rate_table(logs: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Return how often each draft is accepted if those before it are, at the last step of every run."""
    last = {name: log[max(log)] for name, log in logs.items()}
    size = max(sum(key.startswith(RATE) for key in record) for record in last.values())
    places = range(1, size + 1)
    lines = [_row("draft", *map(str, places)), _rule(size)]
    for name, record in last.items():
        lines.append(
            _row(name, *(f"{record[f'{RATE}{place}']:.3f}" if f"{RATE}{place}" in record else "" for place in places))
        )
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(num_numbers: int) -> str:
    return _row("---", *["---:"] * num_numbers)


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, held against the last.")],
    title: Annotated[str, typer.Option(help="Of the page.")] = "Training runs side by side",
    note: Annotated[str, typer.Option(help="What was trained on what; the page's first paragraph.")] = "",
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = FOLDER / "results" / "curves.md",
) -> None:
    """Write the tables."""
    logs = {run.name: read_log(run) for run in runs}
    if len(logs) < max(len(runs), 2):
        raise typer.BadParameter("must name two runs or more, in folders of different names.")
    lines = [
        f"# {title}",
        "",
        *([note, ""] if note else []),
        "Tau is the expected one of the training objective, teacher-forced along text of the target that was held "
        "out, the bonus token's included.",
        "",
        *describe_run(),
        "",
        *tau_table(logs),
        "",
        "How often each draft is accepted if those before it are, at the end:",
        "",
        *rate_table(logs),
    ]
    print(write_page(lines, output))


if __name__ == "__main__":
    typer.run(main)
