"""The site of the pages: it builds without a warning, and says of everything public what it is."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def _public_modules() -> set[str]:
    found = set()
    for file in (ROOT / "dspark_hf").rglob("*.py"):
        names = [
            target.id
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        ]
        if "__all__" in names:
            found.add(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    return found


def _pages_in(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    assert not isinstance(entries, str)
    return [page for entry in entries for page in _pages_in(entry)]  # type: ignore[attr-defined]


def test_the_index_says_what_is_public():
    """A module offers names, and no page says that they stay; or a page promises what is gone."""
    told = (DOCS / "README.md").read_text(encoding="utf-8").partition("Public are the names in")[2]
    assert set(re.findall(r"`(dspark_hf[\w.]*?)(?:\.__all__)?`", told)) == _public_modules()


def test_the_contents_name_pages_that_exist():
    """A page is renamed, and the site's contents lead to the old one."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    elsewhere = {"index.md": "README.md", "pages.md": "docs/README.md"}
    for page in _pages_in(nav):
        place = elsewhere.get(page, f"docs/{page}")
        assert (ROOT / place).is_file() or (ROOT / page).is_file(), page


def test_pictures_follow_light_and_dark():
    """A picture is unreadable on one of the two backgrounds, loads something from elsewhere, or is too large."""
    pictures = sorted((DOCS / "images").glob("*.svg"))
    assert pictures
    for picture in pictures:
        text = picture.read_text(encoding="utf-8")
        assert len(text) < 60_000
        # a terminal's has a background of its own
        assert "prefers-color-scheme: dark" in text or "answer-title" in text, picture.name
        assert "url(http" not in text


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """A link, an anchor or a docstring breaks the site, and only its readers see it."""
    pytest.importorskip("material", reason="the extra `docs` builds the site")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    # names that are imported when somebody asks for them stand in the reference, too
    for module, name in (("dspark_hf.training", "DSparkTrainer"), ("dspark_hf.modeling.formats", "export")):
        page = (tmp_path / "reference" / f"{module}.html").read_text(encoding="utf-8")
        assert f'id="{module}.{name}"' in page
    # a page outside docs/ is brought in, and links to it are led there
    assert (tmp_path / "examples" / "train_drafter.py").is_file()
    assert 'href="examples/train_drafter.py"' in (tmp_path / "index.html").read_text(encoding="utf-8")
