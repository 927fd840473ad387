"""Where a table came from: hardware, versions, date, commit, command."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("dspark-hf", "transformers", "torch")


def describe_run() -> list[str]:
    """Return the lines, in Markdown, that let someone else run this again."""
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in _PACKAGES)
    command = " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    return [
        f"- hardware: {_processor()}, {torch.get_num_threads()} threads",
        f"- versions: {versions}, Python {platform.python_version()}",
        f"- date: {datetime.now(timezone.utc):%Y-%m-%d}, commit: {_commit()}",
        f"- again: `{command}`",
    ]


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.processor() or platform.machine()


def _commit() -> str:
    try:
        commit = _git("rev-parse", "--short=10", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "none"
    # results are what a run writes: a table that is being renewed does not make the code another
    is_dirty = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md")
    return f"{commit} with uncommitted changes" if is_dirty else commit


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent.parent
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
