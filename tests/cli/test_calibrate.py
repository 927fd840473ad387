"""`dspark-hf calibrate` from the command line to the drafter's configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dspark_hf import DSparkAssistantModel, figures
from dspark_hf.cli.calibrate import Objective, _fit, calibrate
from dspark_hf.demo.tiny import write_tiny_pair
from dspark_hf.evaluation import loading

app = typer.Typer()
app.command("calibrate")(calibrate)

WORDS = ("baba dufo", "kali mone raba", "nera moli", "foka", "rane dudu baka", "momo")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pair, other drafters and prompts."""
    folder = tmp_path_factory.mktemp("calibrate")
    write_tiny_pair(folder)
    shutil.copytree(folder / "drafter", folder / "headless")
    config = json.loads((folder / "headless" / "config.json").read_text(encoding="utf-8"))
    (folder / "headless" / "config.json").write_text(json.dumps({**config, "enable_confidence_head": False}))
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"turns": [text]}) for text in WORDS))
    (folder / "one.jsonl").write_text(json.dumps({"prompt": "baba"}))
    return folder


@pytest.fixture
def folder(pair: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pair, tmp_path / "folder")


def _run(folder: Path, *arguments: str) -> tuple[int, str]:
    given = {name: str(folder / name[2:]) for name in ("--target", "--drafter")}
    given |= {"--prompts": str(folder / "prompts.jsonl"), "--max-new-tokens": "24", "--min-reached": "5"}
    options = [part for pair in given.items() if pair[0] not in arguments for part in pair]
    # wide and without colours, so that messages can be found
    result = CliRunner().invoke(app, [*options, *arguments], env={"COLUMNS": "500", "NO_COLOR": "1"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_calibrates_the_drafter_in_its_folder(pair, folder):
    """The command does not do what its help says."""
    code, output = _run(folder, "--report", str(folder / "report"), "--batch-size", "4", "--force")
    assert code == 0, output
    assert "mean calibration error" in output
    old, new = _config(pair / "drafter"), _config(folder / "drafter")
    temperatures = new.pop("sts_temperatures")
    assert old.pop("sts_temperatures") is None
    assert old == new
    assert len(temperatures) == new["block_size"]
    # an untrained head knows nothing: there is always something to correct
    assert temperatures != [1.0] * len(temperatures)
    fields = json.loads((folder / "report" / "calibration.json").read_text(encoding="utf-8"))
    assert fields["sts_temperatures"] == temperatures
    assert fields["validation"]["num_prompts"] == fields["fitting"]["num_prompts"] == 3
    assert "transformers" in fields["provenance"]["versions"]
    assert (folder / "report" / "reliability.png").is_file()
    assert DSparkAssistantModel.from_pretrained(folder / "drafter").config.sts_temperatures == temperatures


def test_same_command_same_temperatures(folder):
    """Two runs of one command give different drafters."""
    options = ("--temperature", "1", "--force", "--objective", "ece", "--num-prompts", "4")
    for name in ("first", "second"):
        code, output = _run(folder, *options, "--output", str(folder / name))
        assert code == 0, output
        assert "Fitted to the expected calibration error, as in the paper." in output
    assert _config(folder / "first") == _config(folder / "second")
    assert _config(folder / "drafter")["sts_temperatures"] is None


def test_temperatures_that_do_not_help_are_not_saved(folder, monkeypatch):
    """A drafter is made worse, and the command reports success."""
    monkeypatch.setattr("dspark_hf.calibration.report.CalibrationReport.is_improvement", False)
    code, output = _run(folder)
    assert code == 1
    assert "Not saved: the validation prompts get no better." in output
    assert _config(folder / "drafter")["sts_temperatures"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", "{folder}/absent.jsonl"), "`--prompts` must be a file"),
        (("--prompts", "{folder}/one.jsonl"), "`--prompts` must hold at least 2 prompts"),
        (("--prompts", "{folder}/drafter/config.json"), "must hold one JSON object a line"),
        (("--drafter", "{folder}/nowhere"), "`--drafter` must be the folder or hub name of a DSpark drafter"),
        (("--drafter", "{folder}/target"), "must hold a DSpark drafter"),
        (("--drafter", "{folder}/headless"), "`drafter` must have a confidence head"),
        (("--output", "{folder}/drafter"), "`--output` must be a new or empty folder"),
        (("--report", "{folder}/one.jsonl"), "`--report` must be a folder, got the file"),
    ],
)
def test_mistakes_are_told_before_models_are_loaded(folder, monkeypatch, arguments, message):
    """A user waits for the models to load, or reads a traceback, before hearing of a typing error."""
    monkeypatch.setattr(loading, "load_models", lambda *args, **kwargs: pytest.fail("the models were loaded"))
    code, output = _run(folder, *(one.format(folder=folder) for one in arguments))
    assert code == 2
    assert message in output


def test_missing_matplotlib_is_told_at_once(folder, monkeypatch):
    """The report fails after an hour of work."""
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    monkeypatch.setattr(loading, "load_models", lambda *args, **kwargs: pytest.fail("the models were loaded"))
    code, output = _run(folder, "--report", str(folder / "report"))
    assert code == 2
    assert "`matplotlib` must be installed" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "{folder}/nowhere"), "`--target` must be the folder or hub name"),
        (("--max-new-tokens", "600"), "prompts must leave room for `--max-new-tokens`"),
    ],
)
def test_what_does_not_fit_is_told(folder, arguments, message):
    """A user reads a traceback."""
    code, output = _run(folder, *(one.format(folder=folder) for one in arguments))
    assert code == 2
    assert message in output


@pytest.mark.parametrize(
    ("helps", "briers", "chosen"),
    [((True, True), (0.2, 0.1), "brier"), ((True, True), (0.1, 0.1), "ece"), ((False, False), (0.2, 0.1), "ece")],
)
def test_auto_takes_the_sharper_fit(monkeypatch, helps, briers, chosen):
    """A fit that makes all blocks look alike is preferred for its calibration error."""
    results = {
        name: SimpleNamespace(
            name=name, is_improvement=help_, validation=SimpleNamespace(after=SimpleNamespace(mean_brier=brier))
        )
        for name, help_, brier in zip(("ece", "brier"), helps, briers, strict=True)
    }
    monkeypatch.setattr(
        "dspark_hf.calibration.report.calibrate", lambda observations, *, objective, min_reached: results[objective]
    )
    assert _fit(None, Objective.auto, 1).name == chosen
    assert _fit(None, Objective.brier, 1).name == "brier"


def test_what_no_answer_can_give_is_told_before_any(folder, monkeypatch):
    """All prompts are answered, and then there are too few blocks, which was sure from the start."""

    def fail(*args, **kwargs):
        raise AssertionError("the models were loaded")

    monkeypatch.setattr(loading, "load_models", fail)
    code, output = _run(folder, "--min-reached", "67")
    assert code == 2
    assert "`--min-reached` must be at most 66" in output and "Give more `--prompts`" in output


def test_a_confidence_that_is_no_number_is_told_at_once(folder):
    """All prompts are answered with a damaged drafter, and then nothing can be fitted."""
    tensors = load_file(folder / "drafter" / "model.safetensors")
    tensors["confidence_head.proj.weight"].fill_(float("nan"))
    save_file(tensors, folder / "drafter" / "model.safetensors", {"format": "pt"})
    code, output = _run(folder)
    assert code == 2
    assert "must have a confidence in [0, 1], got NaN" in output
