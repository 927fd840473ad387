"""`dspark-hf` before and around its commands: help, versions, and when the package is loaded."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import dspark_hf
from dspark_hf.cli.command import PackageCommand, load_package
from dspark_hf.cli.main import app
from tests.thinning import mostly_slow, slow

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "demo",
    "generate",
    "chat",
    "serve",
    "data",
    "train",
    "calibrate",
    "profile",
    "export",
    "estimate",
    "tiny-v4",
    "eval",
    "doctor",
    "lm-eval",
    "version",
)
# these run without the package
LIGHT = ("estimate", "version")
MODEL = "deepseek-ai/DeepSeek-V4-Flash"

# what the installed script does, then what it has loaded
SCRIPT = """
import gc, sys
from dspark_hf_cli import main
try:
    main()
finally:
    package = sys.modules["dspark_hf"]
    print("loaded:", *(name for name in ("torch", "transformers") if name in sys.modules))
    print("complete:", hasattr(package, "DSparkConfig"))
    print("collects garbage:", gc.isenabled())
"""


def _run_script(*arguments: str) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        slow(["--help"], 0),
        slow(["--version"], 0),
        (["train", "-h"], 0),
        slow(["version"], 0),
        (["estimate", MODEL], 0),
        (["train", "--nonsense"], 2),
        slow(["nonsense"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_wait_for_pytorch(arguments, expected):
    """Help, versions and mistyped options take seconds, since something imports PyTorch at its top."""
    code, output = _run_script(*arguments)
    assert code == expected, output
    assert "loaded:\n" in output


def test_a_command_finds_the_whole_package(fresh, tmp_path):
    """The package is left half imported, so that models are not registered, or a long run never frees its garbage."""
    result = fresh.run(SCRIPT, "tiny-v4", "--out", str(tmp_path / "tiny"))
    assert result.returncode == 0, result.stderr
    assert "loaded: torch transformers\n" in result.stdout
    assert "complete: True" in result.stdout
    assert "collects garbage: True" in result.stdout


def test_every_command_loads_the_package_but_the_light_ones():
    """A new command runs on a half imported package."""
    commands = typer.main.get_command(app).commands
    assert tuple(commands) == COMMANDS
    assert tuple(name for name in commands if not isinstance(commands[name], PackageCommand)) == LIGHT


def test_a_package_that_is_there_stays():
    """From Python, commands would run `dspark_hf/__init__.py` again."""
    config = dspark_hf.DSparkConfig
    load_package()
    assert sys.modules["dspark_hf"] is dspark_hf
    assert dspark_hf.DSparkConfig is config


@pytest.mark.parametrize(
    "arguments",
    mostly_slow([(), *((command,) for command in COMMANDS)], [(), ("train",), ("estimate",)]),
    ids=lambda names: " ".join(names),
)
def test_short_help(arguments):
    """`-h` is an unknown option of some command."""
    short, long = (CliRunner().invoke(app, [*arguments, option]) for option in ("-h", "--help"))
    assert short.exit_code == long.exit_code == 0
    assert short.output == long.output


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal(command):
    """Names of options are cut, so that nobody can type them."""
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    cut = [line for line in result.output.splitlines() if "…" in line]
    assert "--help" in result.output and cut == []


def test_commands_agree_on_names():
    """One command writes with `--output`, another with a name that has to be looked up."""
    options = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in typer.main.get_command(app).commands.items()
    }
    writing = ("data", "train", "calibrate", "profile", "estimate", "tiny-v4", "eval")
    assert all("--output" in options[name] for name in writing)
    assert all({"--target", "--drafter", "--prompts"} <= options[name] for name in ("data", "calibrate", "eval"))
    assert all("--num-prompts" in options[name] for name in ("demo", "calibrate", "eval"))
    assert all("--repeats" in options[name] for name in ("demo", "profile", "eval"))
    # what they were called before
    assert "--out" in options["tiny-v4"] and "--json" in options["estimate"]
    assert {"--prompts", "--runs"} <= options["demo"]


def test_completion_is_offered():
    """A shell cannot complete commands and options."""
    result = CliRunner().invoke(
        app,
        [],
        env={"_DSPARK_HF_COMPLETE": "complete_bash", "COMP_WORDS": "dspark-hf ti", "COMP_CWORD": "1"},
        prog_name="dspark-hf",
    )
    assert result.output.split() == ["tiny-v4"]


def test_version():
    """Three places tell three versions."""
    installed = metadata.version("dspark-hf")
    assert dspark_hf.__version__ == installed
    assert CliRunner().invoke(app, ["--version"]).output == f"dspark-hf {installed}\n"
    assert CliRunner().invoke(app, ["version"]).output.startswith(f"dspark-hf {installed}\n")


def test_version_without_an_installation():
    """A checkout on the path, never installed, cannot be imported."""
    # the file alone: an environment that runs the tests has the package installed
    code = (
        "import runpy, sys; from importlib import metadata\n"
        "def absent(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = absent\n"
        "print(runpy.run_path(sys.argv[1])['__version__'])"
    )
    path = ROOT / "dspark_hf" / "version.py"
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout == "0+unknown\n"


def test_runs_as_a_module(fresh):
    """`python -m dspark_hf` stops working."""
    code = "import runpy; runpy.run_module('dspark_hf', run_name='__main__', alter_sys=True)"
    result = fresh.run(code, "--version")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"dspark-hf {dspark_hf.__version__}\n"
