"""`dspark-hf export` from its arguments to the line that uses what was written."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dspark_hf.cli.main import app
from dspark_hf.demo.tiny import write_tiny_pair


def test_the_next_line_uses_the_folder(tmp_path: Path, capfd) -> None:
    """A folder for Transformers alone ends in a command that needs this package, or among bars of files."""
    target, drafter = write_tiny_pair(tmp_path)
    capfd.readouterr()
    arguments = ["export", str(drafter), "--to", "custom_generate", "--output", str(tmp_path / "alone")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "500", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert "Loading weights" not in result.output + capfd.readouterr().err
    (call,) = re.findall(r"Next: target\.generate\(\*\*inputs, (.+)\)", result.output)
    assert call == f"custom_generate={str(tmp_path / 'alone')!r}, trust_remote_code=True"
    model = AutoModelForCausalLM.from_pretrained(target)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 8, "do_sample": False}
    told = {"custom_generate": str(tmp_path / "alone"), "trust_remote_code": True}
    assert torch.equal(model.generate(**inputs, **told), model.generate(**inputs))
