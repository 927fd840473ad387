"""What MkDocs is told beyond mkdocs.yml, so that the pages stay as a forge shows them.

Pages link to files of the repository that lie outside docs/: these are brought into the site, and the links led there.
The reference has a page for every module that says in `__all__` what is public; nothing is imported for it.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dspark_hf"
# where a file of the repository stands in the site, unless its place is the same
PLACES = {"README.md": "index.md", "docs/README.md": "pages.md"}
# links of Markdown and of HTML in it; the second group is the address
LINK = re.compile(r"""(\]\(|(?:src|href)=")([^)\s"]+)""")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add what mkdocs.yml does not name, pages of which it knows nothing and the reference, and a forge's anchors."""
    named = set(_pages_in(config.nav))
    pages = {_place(f"docs/{path.name}") for path in (ROOT / "docs").glob("*.md")} - {"package.md"}
    config.nav = [
        *(config.nav or []),
        *([{"More": sorted(pages - named)}] if pages - named else []),
        {"Reference": [{module: _reference_page(module)} for module in sorted(public_modules())]},
    ]
    # the anchors that a forge gives
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages lead to outside docs/, the first page, and the reference."""
    index = files.get_file_from_path("README.md")
    if index is not None:
        files.remove(index)
    waiting = ["README.md", "docs/README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    known: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in known:
            continue
        known.add(path)
        if files.get_file_from_path(_place(path)) is None and path != "docs/package.md":
            files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            waiting += [found for _, link in LINK.findall(text) if (found := _resolved(link, path))]
    for module, names in public_modules().items():
        files.append(File.generated(config, _reference_page(module), content=_reference(module, names)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead a page's links to where their files stand in the site."""
    if page.file.generated_by and page.file.abs_src_path is None:
        return markdown
    path = _repository_path(page.file.src_uri)

    def led(match: re.Match[str]) -> str:
        found = _resolved(match[2], path)
        if found is None:
            return match[0]
        address = posixpath.relpath(_place(found), posixpath.dirname(_place(path)) or ".")
        _, hash_, heading = match[2].partition("#")
        return f"{match[1]}{address}{hash_}{heading}"

    return LINK.sub(led, markdown)


def public_modules() -> dict[str, list[str]]:
    """Return the names in `__all__` by module, for every module of the package that has it."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(getattr(name, "id", "") == "__all__" for name in node.targets):
                parts = file.relative_to(ROOT).with_suffix("").parts
                module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found[module] = sorted(ast.literal_eval(node.value))
    return found


def _reference_page(module: str) -> str:
    return f"reference/{module}.md"


def _reference(module: str, names: list[str]) -> str:
    return f"# {module}\n\n" + "\n".join(f"::: {module}.{name}\n" for name in names)


def _pages_in(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for entry in nav.values():
            yield from _pages_in(entry)
    else:
        for entry in nav or []:
            yield from _pages_in(entry)


def _place(path: str) -> str:
    """Return where a file of the repository stands in the site."""
    return PLACES.get(path, path.removeprefix("docs/"))


def _repository_path(place: str) -> str:
    """Return the file of the repository that stands at a place of the site."""
    special = {value: key for key, value in PLACES.items()}
    if place in special:
        return special[place]
    return f"docs/{place}" if (ROOT / "docs" / place).is_file() else place


def _resolved(link: str, page: str) -> str | None:
    """Return the file of the repository that a link of a page means; None for one that leads elsewhere or nowhere."""
    name = link.partition("#")[0]
    if not name or "://" in name or name.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), name))
    # a forge shows the page of a folder
    path = f"{path}/README.md" if (ROOT / path).is_dir() else path
    return path if (ROOT / path).is_file() else None
