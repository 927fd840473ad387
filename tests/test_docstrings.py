"""Every example in a docstring runs, and says what it prints."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import dspark_hf


def _holds_examples(path: Path) -> bool:
    # skipped ones need a network
    lines = path.read_text(encoding="utf-8").splitlines()
    return any(">>> " in line and "+SKIP" not in line for line in lines)


def _path(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


NAMES = [module.name for module in pkgutil.walk_packages(dspark_hf.__path__, "dspark_hf.")]
MODULES = [name for name in NAMES if _holds_examples(_path(name))]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    """An example in the documentation does not run, or prints something else."""
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_examples_are_found():
    """The walk over the package misses folders, so that their examples are never run."""
    files = [path for path in Path(dspark_hf.__path__[0]).rglob("*.py") if _holds_examples(path)]
    assert len(MODULES) == len(files) > 0
