"""Scripts in an interpreter that has not imported the package.

Transformers takes seconds to import: one process does so for all tests, and each script runs in a fork of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

_SERVER = """
import json, os, sys, traceback
import torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.generation import GenerationMixin

def run(code, arguments, folder, environment):
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
        mode = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, mode), number)
    try:
        exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    assert not any(name.split(".")[0] == "dspark_hf" for name in sys.modules)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = run(*json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
# to tear down PyTorch in order takes a while
os._exit(0)
"""


@dataclass
class Finished:
    """How a script ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class FreshInterpreter:
    """A process that has imported Transformers, but not us; `folder` is its home, with all caches."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, *arguments: str, environment: dict[str, str] | None = None) -> Finished:
        """Run `code` with these arguments in a folder of its own, from which only a path can find the package."""
        folder = self._folder / "script"
        folder.mkdir(exist_ok=True)
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([code, arguments, str(folder), environment or {}]) + "\n")
        process.stdin.flush()
        returncode = int(process.stdout.readline())
        stdout, stderr = ((folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return Finished(returncode, stdout, stderr)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            environment = {
                **os.environ,
                "HF_HOME": str(self._folder),
                "HF_MODULES_CACHE": str(self._folder / "modules"),
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(REPOSITORY),
            }
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVER], cwd=self._folder, env=environment, **pipes
            )
        return self._process

    def close(self) -> None:
        """End the process, if a test has started it."""
        if self._process is not None:
            self._process.communicate()
