"""The examples run as they are."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest

from dspark_hf import DSparkAssistantModel
from dspark_hf.demo.tiny import write_tiny_pair
from tests.tiny import tiny_target
from tests.training.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_title(notebook):
    """A notebook has no title, or its sections stand beside it rather than below."""
    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "markdown"]
    headings = [line for source in cells for line in source.splitlines() if re.match("#+ ", line)]
    assert cells[0].startswith(headings[0])
    assert [heading.split()[0] for heading in headings] == ["#", *["##"] * (len(headings) - 1)]


@pytest.fixture
def tiny_models(tmp_path, monkeypatch) -> None:
    """Let notebooks find tiny random models, and little to do."""
    target = tiny_target("qwen3")
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "target")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    drafter.save_pretrained(tmp_path / "drafter")
    for name, value in (("TARGET", tmp_path / "target"), ("DRAFTER", tmp_path / "drafter")):
        monkeypatch.setenv(f"DSPARK_HF_{name}", str(value))
    monkeypatch.setenv("DSPARK_HF_CONVERSATIONS", "16")
    monkeypatch.setenv("DSPARK_HF_STEPS", "2")
    monkeypatch.setenv("MPLBACKEND", "Agg")


def _code(notebook: Path) -> list[str]:
    cells = nbformat.read(notebook, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("quickstart", "the texts are identical"),
        pytest.param("batches_and_streams", "everything: 0 new tokens (cancelled)", marks=pytest.mark.slow),
        pytest.param("your_own_drafter", "the same texts, and tau", marks=pytest.mark.slow),
        pytest.param("deepseek_v4_tiny", "the texts are identical", marks=pytest.mark.slow),
    ],
)
def test_notebooks(name, printed, tiny_models, monkeypatch, capsys):
    """A newcomer runs a notebook from top to bottom, and a cell fails."""
    if name == "your_own_drafter":
        # it makes a target of its own, with words enough for prompts
        monkeypatch.delenv("DSPARK_HF_TARGET")
    monkeypatch.chdir(EXAMPLES)
    left: dict[str, object] = {}
    for source in _code(EXAMPLES / f"{name}.ipynb"):
        exec(source, left)
    assert printed in capsys.readouterr().out


@pytest.mark.slow
def test_quickstart_notebook_in_a_kernel(tiny_models):
    """A notebook runs as a script only: what it shows cannot be shown."""
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    resources = {"metadata": {"path": str(EXAMPLES)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", ())}
    assert "text/html" in shown


def test_every_notebook_is_run():
    """A notebook is added, and no test runs it."""
    assert {path.stem for path in NOTEBOOKS} == {
        "adapt_drafter",
        "batches_and_streams",
        "deepseek_v4_tiny",
        "quickstart",
        "your_own_drafter",
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_what_a_reader_sees(path):
    """A reader on a forge sees no outputs, an error, or the paths of another machine; or a clone grows."""
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures and all(len(picture) * 3 // 4 < 60_000 for picture in pictures)
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert not re.search(r"/(home|root|tmp|Users)/", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [*NOTEBOOKS, *EXAMPLES.glob("*.py")], ids=lambda path: path.name)
def test_examples_use_public_names(path):
    """A user copies a line whose name may move with the next version."""
    code = "\n".join(_code(path)) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "dspark_hf":
            public = importlib.import_module(str(node.module)).__all__
            assert {alias.name for alias in node.names} <= set(public), node.module


@pytest.mark.slow
def test_adapt_drafter_notebook():
    """A fine-tune's owner is shown steps that do not work."""
    from nbclient import NotebookClient

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
