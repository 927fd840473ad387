"""Who may import whom: each layer only the ones below it, and absolutely."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dspark_hf"
# what any layer may use
SHARED = {"figures", "files", "loading", "prompts", "provenance"}
BELOW = {
    "chat": {"chat"},
    "estimation": {"estimation"},
    "profiling": {"profiling", "figures", "files"},
    "generation": {"generation", "profiling", "provenance"},
    # chat: a tiny checkpoint comes with a tokenizer
    "modeling": {"generation", "modeling", "chat"},
    "calibration": {"generation", "modeling", "calibration", *SHARED},
    # only the metrics, see below
    "evaluation": {"generation", "modeling", "evaluation", "calibration", *SHARED},
    "training": {"generation", "modeling", "training", *SHARED},
    "demo": {"generation", "modeling", "demo", "", *SHARED},
    "cli": {
        "generation",
        "modeling",
        "training",
        "calibration",
        "evaluation",
        "estimation",
        "profiling",
        "demo",
        "cli",
        "version",
        "",
        *SHARED,
    },
}
FILES = sorted(path for layer in BELOW for path in (PACKAGE / layer).rglob("*.py"))


def _imported_layers(tree: ast.Module) -> set[str]:
    modules = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 for node in modules), "relative import"
    names = [node.module or "" for node in modules]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    ours = [name.split(".") for name in names if name.split(".")[0] == "dspark_hf"]
    return {parts[1] if len(parts) > 1 else "" for parts in ours}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_point_down(path):
    """A lower layer imports a higher one, so that it can no longer be used or tested alone."""
    assert _imported_layers(ast.parse(path.read_text(encoding="utf-8"))) <= BELOW[path.relative_to(PACKAGE).parts[0]]


@pytest.mark.parametrize("path", sorted((PACKAGE / "evaluation").glob("*.py")), ids=lambda path: path.name)
def test_evaluation_takes_only_metrics_from_calibration(path):
    """Two layers of the same height grow together."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    taken = {module for module in modules if module.startswith("dspark_hf.calibration")}
    assert taken <= {"dspark_hf.calibration.metrics"}
