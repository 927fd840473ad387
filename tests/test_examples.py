"""The examples run as they are."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from dspark_hf.demo.tiny import write_tiny_pair

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_quickstart_notebook():
    """The first thing a newcomer opens does not run."""
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "tokens per round" in printed


@pytest.mark.slow
def test_adapt_drafter_notebook():
    """A fine-tune's owner is shown steps that do not work."""
    notebook = nbformat.read(EXAMPLES / "adapt_drafter.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "72 tokens, for" in printed
    before, after = re.search(r"held-out tau ([\d.]+) before, ([\d.]+) after", printed).groups()
    assert float(after) > float(before)


def test_pipeline(tmp_path, monkeypatch, capsys):
    """A drafter cannot be given to a pipeline by name."""
    target, drafter = write_tiny_pair(tmp_path)
    arguments = ["pipeline.py", str(target), str(drafter), "--prompt", "ba du fo", "--max-new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / "pipeline.py"), run_name="__main__")
    assert "tokens per round" in capsys.readouterr().out


def test_train_drafter(tmp_path, monkeypatch, capsys):
    """A user cannot make a drafter for a model of their own, or a second run begins anew."""
    target, _ = write_tiny_pair(tmp_path)
    words = [
        f"{first}{second} kali" for first in ("ba", "du", "fo", "ne") for second in ("ba", "du", "fo", "ka", "mo")
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in words))
    arguments = ["train_drafter.py", str(target), "--output", str(tmp_path / "mine"), "--num-conversations", "20"]
    arguments += ["--prompts", str(tmp_path / "prompts.jsonl")]
    arguments += ["--max-new-tokens", "24", "--max-steps", "2", "--draft-vocab", "50"]
    monkeypatch.setattr(sys, "argv", arguments)
    for _ in range(2):
        runpy.run_path(str(EXAMPLES / "train_drafter.py"), run_name="__main__")
        assert "tokens per round" in capsys.readouterr().out
    assert len((tmp_path / "mine" / "texts.jsonl").read_text(encoding="utf-8").splitlines()) == 20


@pytest.mark.slow
def test_grpo_rollouts(tmp_path, monkeypatch, capsys):
    """Rollouts of TRL's trainer cannot draft, or its next version calls `generate` otherwise."""
    pytest.importorskip("trl")
    target, drafter = write_tiny_pair(tmp_path)
    words = [f"{first}{second} kali" for first in ("ba", "du", "fo") for second in ("ba", "ka", "mo")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in words))
    arguments = ["grpo_rollouts.py", str(target), str(drafter), str(tmp_path / "prompts.jsonl")]
    arguments += ["--output", str(tmp_path / "run"), "--steps", "3", "--adapt-every", "1", "--max-new-tokens", "16"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / "grpo_rollouts.py"), run_name="__main__")
    lines = capsys.readouterr().out.split("steps of the policy")[1].splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["1 to 1", "2 to 2", "3 to 3"]
