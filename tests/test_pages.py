"""Pages lead where they say, and none is forgotten."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """A reader follows a link to a page, or a heading, that is not there."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if heading:
            lines = target.read_text(encoding="utf-8").splitlines()
            assert heading in {_anchor(line) for line in lines if line.startswith("#")}, link


@pytest.mark.parametrize("notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_links_of_notebooks_lead_somewhere(notebook):
    """A reader of a notebook follows a link to a page that is not there."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = LINK.findall(text)
    assert links
    for link in links:
        assert link.startswith("https://") or (notebook.parent / link.partition("#")[0]).is_file(), link


def _anchor(line: str) -> str:
    words = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
    return words.replace(" ", "-")


@pytest.mark.parametrize("page", ["docs/adapting.md", "docs/training.md", "drafters/README.md"])
def test_commands_have_the_options_that_are_given(page):
    """A reader pastes a command, and one of its options is unknown."""
    from typer.main import get_command

    from dspark_hf.cli.main import app

    commands = get_command(app).commands
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    given = [found for line in lines if (found := re.search(r"dspark[-_]hf (\w+) (.*)", line))]
    assert given
    for name, options in (found.groups() for found in given):
        known = {
            option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(re.findall(r"--[a-z][\w-]+", options)) <= known, (name, options)


def test_every_page_is_in_the_index():
    """A page is written, and nobody finds it."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    # what an index of packages shows stands alone
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md", "package.md"}
    assert pages <= set(LINK.findall(index))


def test_the_page_of_the_package_stands_alone():
    """On an index, where there is no repository around the page, its links are dead, or its code is an older one."""
    page = (ROOT / "docs" / "package.md").read_text(encoding="utf-8")
    assert 'readme = "docs/package.md"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(link.startswith("https://") for link in LINK.findall(page))
    code = re.compile(r"```python\n.*?```", re.DOTALL)
    assert code.findall(page) == code.findall((ROOT / "README.md").read_text(encoding="utf-8"))[:1]
