"""Who may import whom: each layer only the ones below it, and absolutely."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dspark_hf"
BELOW = {
    "generation": {"generation"},
    "modeling": {"generation", "modeling"},
    "calibration": {"files", "generation", "modeling", "calibration", "prompts"},
    "evaluation": {"files", "generation", "modeling", "evaluation", "calibration", "prompts"},
    "training": {"files", "generation", "modeling", "training", "prompts"},
    "demo": {"files", "generation", "modeling", "demo", ""},
    "cli": {"generation", "modeling", "training", "calibration", "evaluation", "demo", "prompts", "cli", ""},
}
FILES = sorted(path for layer in BELOW for path in (PACKAGE / layer).glob("*.py"))


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
    assert _imported_layers(ast.parse(path.read_text(encoding="utf-8"))) <= BELOW[path.parent.name]
