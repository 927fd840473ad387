"""Who may import whom: each floor only the ones below it, absolutely, and nothing in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

PACKAGE = Path(__file__).parent.parent / "dspark_hf"
# top-level files that any floor may use; they know nothing of ours but each other
SHARED = {
    "adapters",
    "console",
    "damage",
    "figures",
    "files",
    "hubs",
    "journal",
    "lazy",
    "moved",
    "pieces",
    "places",
    "prompts",
    "provenance",
    "version",
}
# what each folder may import besides itself and the shared files; "" is the package itself
BELOW: dict[str, set[str]] = {
    "generation": set(),
    # what a person looks at of the costs that `generation` learns
    "profiling": {"generation"},
    "modeling": {"generation"},
    "registry": {"generation", "modeling", "loading"},
    # only the metrics, see below
    "evaluation": {"generation", "modeling", "calibration", "loading"},
    "calibration": {"generation", "modeling", "loading"},
    "data": {"generation", "modeling", "training", "loading"},
    "training": {"generation", "modeling", "loading"},
    # how answers look in a terminal, whoever answers
    "terminal": {"generation"},
    # a network's side of requests that come and go
    "serving": {"generation"},
    "demo": {"generation", "modeling", "terminal", "loading", ""},
    "doctor": {"generation", "modeling", "profiling", "loading", "registry"},
    "cli": {
        "generation",
        "profiling",
        "modeling",
        "calibration",
        "evaluation",
        "data",
        "training",
        "registry",
        "terminal",
        "serving",
        "demo",
        "doctor",
        "loading",
        "",
    },
}
# top-level files with a place of their own: the public names, the command line as a program, and models from folders
# or the hub
TOP = {
    "__init__": {"generation", "modeling", "registry", "doctor", "evaluation"},
    "__main__": {"cli"},
    "loading": {"modeling"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Return a file's module name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Give the modules of ours that a file imports, wherever it does so, but for annotations alone."""
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def import_graph(sources: dict[str, str]) -> networkx.DiGraph:
    """Return who imports whom among `sources`, text by module name."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(sources)
    for name, text in sources.items():
        for found in imports(ast.parse(text), set(sources)):
            # the package itself is loaded before any of its modules, and says nothing of what needs what
            if found in sources and found not in (name, PACKAGE.name):
                graph.add_edge(name, found)
    return graph


def circles(graph: networkx.DiGraph) -> list[list[str]]:
    """Return the groups of modules that need each other."""
    return [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Every file's text by module name."""
    return {name_of(path): path.read_text(encoding="utf-8") for path in FILES}


@pytest.fixture(scope="module")
def graph(sources: dict[str, str]) -> networkx.DiGraph:
    """Who imports whom."""
    return import_graph(sources)


def floor_of(module: str) -> str:
    """Return the folder or top-level file that a module belongs to, "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_nothing_goes_in_a_circle(graph):
    """Modules need each other, so that none of them can be read, tested or changed alone."""
    assert circles(graph) == []


def test_a_circle_is_noticed():
    """The test of circles cannot fail: it misses an import inside a function, or one of a submodule by its folder."""
    found = circles(
        import_graph(
            {
                "dspark_hf.a.one": "def f():\n    from dspark_hf.b.two import g",
                "dspark_hf.b.two": "from dspark_hf.a import one",
                "dspark_hf.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import dspark_hf.d",
                "dspark_hf.d": "import dspark_hf.c",
            }
        )
    )
    assert found == [["dspark_hf.a.one", "dspark_hf.b.two"]]


def test_every_room_has_a_floor():
    """A folder or a top-level file may import anything, since nobody said where it stands."""
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert folders == set(BELOW)
    assert files == SHARED | set(TOP)


def test_imports_point_down(sources):
    """A lower floor imports a higher one, so that it can no longer be used or tested alone."""
    for path in FILES:
        name = name_of(path)
        floor = path.stem if path.parent == PACKAGE else floor_of(name)
        modules = imports(ast.parse(sources[name]), set(sources))
        found = {floor_of(module) for module in modules if "dspark_hf" in module}
        below = BELOW.get(floor, TOP.get(floor, set()))
        assert found <= below | SHARED | {floor}, name


def test_evaluation_takes_only_metrics_from_calibration(graph):
    """Two floors of the same height grow together."""
    for path in sorted((PACKAGE / "evaluation").glob("*.py")):
        taken = {module for module in graph.successors(name_of(path)) if module.startswith("dspark_hf.calibration")}
        assert taken <= {"dspark_hf.calibration.metrics"}, path.name


def test_every_folder_opens_with_a_sentence():
    """A newcomer opens a folder and is not told what it is for."""
    for path in sorted(PACKAGE.rglob("__init__.py")):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path.parent.name
