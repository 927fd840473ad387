"""Where numbers came from: hardware, versions, date, commit, command."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

from dspark_hf.version import __version__

# beside our own
_PACKAGES = ("transformers", "torch")


@dataclass(frozen=True)
class Provenance:
    """What someone else needs to run this again.

    Attributes:
        hardware: the accelerator, or the processor and its cores.
        num_threads: threads PyTorch uses on the processor.
        versions: of the packages that decide the output, and of Python.
        date: day, in UTC.
        commit: of the checkout the library runs from, or None if it runs from none.
        program: what was started.
        arguments: the rest of the command line.
    """

    hardware: str
    num_threads: int
    versions: dict[str, str]
    date: str
    commit: str | None
    program: str
    arguments: tuple[str, ...]


def describe_run(*, is_on_cpu: bool = False) -> Provenance:
    """Return the provenance of this process; `is_on_cpu` tells that an accelerator was left aside."""
    versions = {"dspark-hf": __version__, **{package: metadata.version(package) for package in _PACKAGES}}
    return Provenance(
        hardware=_hardware(is_on_cpu),
        num_threads=torch.get_num_threads(),
        versions={**versions, "Python": platform.python_version()},
        date=f"{datetime.now(timezone.utc):%Y-%m-%d}",
        commit=_commit(Path(__file__).parents[1]),
        # the command's own name, also after `python -m dspark_hf`
        program="dspark-hf" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name,
        arguments=tuple(sys.argv[1:]),
    )


def _hardware(is_on_cpu: bool) -> str:
    if not is_on_cpu and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor_name()


@lru_cache(maxsize=1)
def processor_name() -> str:
    """Return the processor's name and its cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    try:
        # an installed package may lie inside some other project's checkout
        if Path(_git(folder, "rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        commit = _git(folder, "rev-parse", "--short=10", "HEAD")
        # results are what a run writes: a table that is being renewed does not make the code another
        unchanged = ("--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md")
        is_dirty = _git(folder, "status", "--porcelain", *unchanged)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with uncommitted changes" if is_dirty else commit


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
