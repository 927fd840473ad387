"""`dspark-hf estimate` from the command line to the file."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from dspark_hf.cli.estimate import estimate
from dspark_hf.modeling.deepseek_v4.estimation import reading

app = typer.Typer()
app.command("estimate")(estimate)

PRO = "deepseek-ai/DeepSeek-V4-Pro"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr(reading, "_download", refuse)


def _run(*arguments: str) -> tuple[int, str]:
    # wide and without colours, so that messages can be found
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "500", "NO_COLOR": "1"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_prints_and_writes(tmp_path):
    """The command does not do what its help says."""
    path = tmp_path / "new" / "estimate.json"
    code, output = _run(PRO, "--context", "1000000", "--batch-size", "4", "--dtype", "bf16", "--json", str(path))
    assert code == 0, output
    assert f"Memory of {PRO}" in output
    assert "KV cache, 4 sequences of 1,000,000" in output
    assert "1,572.997 B" in output
    assert "GFLOPs, FP8 equivalent 318.43 1,148.14 27.7% 27%" in output
    assert "Devices that hold" in output
    fields = json.loads(path.read_text(encoding="utf-8"))
    assert fields["settings"]["weight_format"] == "bf16"
    # no matrix has fewer than two bytes an element now
    assert fields["model"]["weights"]["num_bytes"] > 2 * fields["model"]["weights"]["num_parameters"]


def test_cache_formats_differ(tmp_path):
    """`--cache-dtype` changes nothing."""
    sizes = []
    for cache_dtype in ("released", "bf16", "fp32"):
        path = tmp_path / f"{cache_dtype}.json"
        assert _run(PRO, "--cache-dtype", cache_dtype, "--json", str(path))[0] == 0
        sizes.append(json.loads(path.read_text(encoding="utf-8"))["model"]["cache"]["num_bytes"])
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("someone/unknown",), "`MODEL` must be a name known offline"),
        ((PRO, "--context", "-1"), "`--context` must be at least 1, got -1. Raise it."),
        ((PRO, "--batch-size", "0"), "`--batch-size` must be at least 1, got 0. Raise it."),
        ((PRO, "--dtype", "fp7"), "'fp7' is not one of"),
        ((PRO, "--output", "{folder}"), "`--output` must be a file, got the folder"),
        ((PRO, "--json", "{folder}/file/below.json"), "`--output` must be a file that can be written"),
    ],
)
def test_mistakes_are_told(tmp_path, arguments, message):
    """A user reads a traceback, or numbers for something else than was meant."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, output = _run(*(one.format(folder=tmp_path) for one in arguments))
    assert code == 2
    assert message in output
