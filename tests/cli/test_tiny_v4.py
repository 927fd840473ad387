"""`dspark-hf tiny-v4` from the command line to the folder."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from dspark_hf.cli.main import app


def _run(*arguments: str) -> tuple[int, str]:
    # wide and without colours, so that messages can be found
    result = CliRunner().invoke(app, ["tiny-v4", *arguments], env={"COLUMNS": "500", "NO_COLOR": "1"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_writes_what_is_asked(tmp_path):
    """The command does not do what its help says."""
    folder = tmp_path / "new" / "tiny"
    code, output = _run("--out", str(folder), "--experts", "bf16", "--no-dspark", "--seed", "3")
    assert code == 0, output
    assert f"Written: {folder}" in output
    assert f"Next: python examples/deepseek_v4_inference.py {folder}" in output
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in fields
    assert "dspark_block_size" not in fields
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert not any(name.startswith("mtp.") for name in weight_map)
    assert {path.name for path in folder.glob("*.safetensors")} == set(weight_map.values())
    assert (folder / "tokenizer.json").is_file()


def test_mistakes_are_told(tmp_path):
    """A user reads a traceback, or loses a folder."""
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    code, output = _run("--out", str(tmp_path))
    assert code == 2
    assert "`--output` must be absent or empty, got" in output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    code, output = _run("--out", str(tmp_path / "new"), "--experts", "fp2")
    assert code == 2
    assert "'fp2' is not one of" in output
