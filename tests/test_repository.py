"""What surrounds the package: workflows, forms and hooks parse, and name what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("bug_report", "feature_request")]
YAML_FILES = [
    *WORKFLOWS,
    *(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"),
    ROOT / ".pre-commit-config.yaml",
    ROOT / "CITATION.cff",
]
# pages that tell to run make
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md"]

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _commands(path: Path) -> list[str]:
    return [step["run"] for job in _read(path)["jobs"].values() for step in job["steps"] if "run" in step]


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match, pattern
    return match[1]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_files_parse(path):
    """A file is ignored where it should work, and nobody is told."""
    assert isinstance(_read(path), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_that_exist(path):
    """A target is renamed, and continuous integration breaks only after the push."""
    commands = _commands(path)
    called = {name for command in commands for name in re.findall(r"\bmake ([a-z-]+)", command)}
    assert called and called <= TARGETS
    # a variable that the Makefile does not read changes nothing
    variables = {name for command in commands for name in re.findall(r"\b([A-Z]+)=", command)} | {"TORCH"}
    assert variables <= set(re.findall(r"^([A-Z]+) \?=", MAKEFILE, re.MULTILINE))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_name_targets_that_exist(path):
    """A contributor types a target that is gone."""
    assert set(re.findall(r"`make ([a-z-]+)", path.read_text(encoding="utf-8"))) <= TARGETS


def test_versions_under_test_are_the_supported_ones():
    """The oldest version is raised in one place, and the tests go on with another."""
    oldest, newest = _read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"][
        "transformers"
    ]
    assert f'"{newest}",' in PYPROJECT
    assert _found(r"^TRANSFORMERS \?= (.+)$", MAKEFILE) == newest
    assert _found(r"TRANSFORMERS=(\S+)$", MAKEFILE.partition("\ntest-oldest:")[2]) == oldest
    assert _found(r"==(.+?)\.0$", oldest) == _found(r">=(.+?),", newest)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_pytorch_is_the_same_without_cuda(path):
    """Continuous integration runs on another PyTorch than a clean clone."""
    assert _read(path)["env"]["TORCH"] == _found(r"^TORCH \?= (.+)$", MAKEFILE) + "+cpu"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_forms_are_complete(path):
    """GitHub shows an empty issue in place of the form."""
    form = _read(path)
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) > 0
    assert all(field["attributes"]["label"] for field in form["body"])


def test_a_release_has_one_version_and_one_date():
    """The package, its citation and the list of changes name different releases, or different days."""
    version = _found(r'^version = "(.+)"$', PYPROJECT)
    citation = _read(ROOT / "CITATION.cff")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    # what is newer stands under [Unreleased], above
    newest = _found(r"^## \[(\d.*?)\] - ", changes), _found(r"^## \[\d.*?\] - (.+)$", changes)
    assert newest == (version, str(citation["date-released"]))
    assert citation["version"] == version
