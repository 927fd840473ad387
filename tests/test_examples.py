"""The examples run as they are."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from dspark_hf.demo.tiny import write_tiny_pair

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart_notebook():
    """The first thing a newcomer opens does not run."""
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "tokens per round" in printed


def test_pipeline(tmp_path, monkeypatch, capsys):
    """A drafter cannot be given to a pipeline by name."""
    target, drafter = write_tiny_pair(tmp_path)
    arguments = ["pipeline.py", str(target), str(drafter), "--prompt", "ba du fo", "--max-new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / "pipeline.py"), run_name="__main__")
    assert "tokens per round" in capsys.readouterr().out
