"""Pages of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# the benchmarks, their prompts and what they write
FOLDER = Path(__file__).parent


def write_page(lines: Sequence[str], path: Path) -> str:
    """Write the lines to a file, whose folder is made if need be, and return them as one text."""
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text
