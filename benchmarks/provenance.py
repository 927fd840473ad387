"""Where a table came from: hardware, versions, date, commit, command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from dspark_hf import provenance


def describe_run() -> list[str]:
    """Return the lines, in Markdown, that let someone else run this again."""
    run = provenance.describe_run()
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *run.arguments])
    return [
        f"- hardware: {run.hardware}, {run.num_threads} threads",
        f"- versions: {', '.join(f'{name} {version}' for name, version in run.versions.items())}",
        f"- date: {run.date}, commit: {run.commit or 'none'}",
        f"- again: `{command}`",
    ]
