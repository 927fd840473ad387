"""`dspark-hf doctor`: the verdict is shown, written as JSON, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark_hf.cli.main import app
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
    status, output = _run(folders, "misread", "--json")
    assert status == 3, output
    written = json.loads(output)
    assert written["verdict"]["cause"] == "rotation" and written["verdict"]["exit_status"] == 3


def test_a_mistyped_argument_is_named(folders: Path) -> None:
    """A slip ends in a traceback, or after the models were loaded."""
    status, output = _run(folders, "nothing")
    assert status == 2
    assert "`DRAFTER` must be" in " ".join(output.split())
    status, output = _run(folders, "drafter", "--prompts", str(folders / "none.jsonl"))
    assert status == 2 and "`--prompts` must be a file" in " ".join(output.split())
