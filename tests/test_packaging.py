"""The wheel and the source archive: all is in them, nothing else, and what is in them runs."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from dspark_hf.demo.tiny import write_tiny_pair

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "dspark_hf").rglob("*.py")]


def _extras() -> set[str]:
    table = PYPROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^([a-z]+) = \[", table, re.MULTILINE))


def test_extras_that_are_named_exist():
    """A page or a message tells to install an extra that is gone, and pip installs nothing for it."""
    named = {
        extra
        for page in PAGES
        for found in re.findall(r"dspark-hf\[([a-z,]+)\]", page.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert named and named <= _extras()


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Build both archives, without a network."""
    pytest.importorskip("hatchling", reason="it builds the archives")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "--directory", folder], cwd=ROOT, check=True)
    return folder


def _sources(folder: str) -> set[str]:
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in files}


@pytest.mark.slow
def test_the_wheel_holds_the_package(built):
    """A template or a table is left out, and a command fails where the package is installed."""
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == _sources("dspark_hf") | {"dspark_hf_cli.py"}
    assert {"dspark_hf/py.typed", "dspark_hf/evaluation/report.html.jinja"} <= names


@pytest.mark.slow
def test_the_source_archive_holds_all_but_weights(built):
    """Whoever packs the project for a distribution cannot run its tests, or gets 40 MB of weights."""
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for folder in ("dspark_hf", "tests", "docs", "examples"):
        assert _sources(folder) <= names
    assert {"README.md", "CHANGELOG.md", "Makefile", "mkdocs.yml", ".github/workflows/ci.yml"} <= names
    assert {"drafters/pack.py", "drafters/smollm2-135m-instruct/README.md"} <= names
    assert not any(re.match(r"drafters/\S+/(?!README\.md)", name) for name in names)
    assert archive.stat().st_size < 3_000_000


@pytest.mark.slow
def test_an_index_takes_the_archives(built):
    """A page or a field breaks an index's rules, which shows at the upload."""
    pytest.importorskip("twine")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()], check=True)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """Return the interpreter of a fresh environment with the wheel, and all else from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    site_packages = Path(paths["purelib"])
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site_packages)
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    return Path(paths["scripts"]) / "python"


def _run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -I: nothing of this checkout is seen, whatever PYTHONPATH says
    return subprocess.run([python, "-I", *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_installed_package_decodes(installed, tmp_path):
    """What is installed from an index does not do what the first page shows."""
    target, drafter = write_tiny_pair(tmp_path)
    code = f"""
import dspark_hf
from transformers import AutoModelForCausalLM, AutoTokenizer
target = AutoModelForCausalLM.from_pretrained({str(target)!r})
drafter = dspark_hf.DSparkAssistantModel.from_pretrained({str(drafter)!r})
inputs = AutoTokenizer.from_pretrained({str(target)!r})("baba dufo", return_tensors="pt")
plain = target.generate(**inputs, max_new_tokens=12)
output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=12)
assert plain.tolist() == output.tolist()
print(dspark_hf.__file__, drafter.last_statistics)
"""
    result = _run(installed, tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr
    assert str(installed.parents[1]) in result.stdout and "tau " in result.stdout


@pytest.mark.slow
def test_the_installed_command_runs(installed, tmp_path):
    """The command needs the repository, or lists what only the repository can do."""
    result = _run(installed, tmp_path, "-m", "dspark_hf", "--help")
    assert result.returncode == 0, result.stderr
    assert " generate " in result.stdout and " demo " not in result.stdout
    result = _run(installed, tmp_path, "-m", "dspark_hf", "demo")
    assert result.returncode != 0
    told = " ".join((result.stdout + result.stderr).split())
    # the weights' package is named where it is missing, else the drafters that lie in the repository
    assert "pip install" in told or "Clone the repository" in told
    assert "Traceback" not in told
