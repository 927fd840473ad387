"""Runs of training side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from benchmarks.curves import main


def _write_run(folder: Path, taus: dict[int, float]) -> Path:
    (folder / "drafter").mkdir(parents=True)
    records = [
        {"step": step, "eval_expected_tau": tau, "eval_accept_rate_1": tau - 1, "eval_accept_rate_2": 0.25}
        for step, tau in taus.items()
    ]
    log = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "drafter" / "training_log.jsonl").write_text(log, encoding="utf-8")
    return folder


def test_runs_are_compared_at_steps_that_both_have(tmp_path):
    """A step that one run was not evaluated at stands beside another step of the other run."""
    head = _write_run(tmp_path / "vanilla", {100: 1.5, 200: 1.8, 250: 1.9})
    without = _write_run(tmp_path / "none", {100: 1.25, 200: 1.6})
    main([head, without], note="On one text.", output=tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| 100 | 1.500 | 1.250 | +20.0% |" in page
    assert "| 200 | 1.800 | 1.600 | +12.5% |" in page
    assert "| 250 |" not in page
    assert "| vanilla | 0.900 | 0.250 |" in page and "| none | 0.600 | 0.250 |" in page


def test_a_run_that_has_not_ended_is_told_by_name(tmp_path):
    """What is missing reads as a run without evaluations."""
    ended = _write_run(tmp_path / "vanilla", {100: 1.5})
    with pytest.raises(typer.BadParameter, match="finished training runs.*missing"):
        main([ended, tmp_path / "missing"], output=tmp_path / "page.md")
    with pytest.raises(typer.BadParameter, match="two runs or more"):
        main([ended], output=tmp_path / "page.md")
