"""A file of records survives crashes and has one writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dspark_hf.journal import InUseError, Journal


def test_records_are_there_at_once(tmp_path: Path) -> None:
    """A killed run would lose what it had written."""
    path = tmp_path / "new" / "journal.jsonl"
    with Journal(path) as journal:
        assert journal.records == []
        journal.append({"text": "é\n"})
        assert json.loads(path.read_text(encoding="utf-8")) == {"text": "é\n"}
    with Journal(path) as journal:
        assert journal.records == [{"text": "é\n"}]


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b'{"number": 2', 1),
        (b'{"text": "\xc3', 1),
        (b"\x00" * 70_000, 1),
        (b'{"number": 2}', 2),
        (b'{"number": 2}\n\n', 2),
        (b"", 1),
    ],
)
def test_a_torn_last_line_is_cut_off(tail: bytes, expected: int, tmp_path: Path) -> None:
    """A crash would leave a file that no one can read or continue, or a whole line would be lost."""
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"number": 1}\n' + tail)
    with Journal(path) as journal:
        assert len(journal.records) == expected
        journal.append({"number": 3})
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    assert [json.loads(line)["number"] for line in lines] == [*range(1, expected + 1), 3]


def _only_numbers(record: dict[str, Any], number: int) -> None:
    if "number" not in record:
        raise ValueError(f"another record on line {number}")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(json.dumps([{"messages": ["precious"]}] * 50).encode(), id="a JSON list"),
        pytest.param(b"precious words", id="one line of text"),
        pytest.param(bytes(range(256)) * 20, id="binary"),
        pytest.param(b"# Title\n\nprecious words", id="Markdown"),
        pytest.param(b"a,b\n1,2", id="a table"),
        pytest.param(b'{"user": "a"}\n{"user": "precious"}', id="other lines"),
        pytest.param(b'{"user": "a"}\n{"user": "prec', id="other lines, torn"),
        pytest.param(b'{"number": 1}\n{"user": "precious"}', id="another line at the end"),
        pytest.param(b'{"number": 1}\nprecious', id="text at the end"),
        pytest.param(b'{"number"', id="nothing whole"),
        pytest.param(b"[" * 200_000 + b"\n", id="deep"),
    ],
)
def test_a_file_of_another_kind_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    """A file named by mistake loses its last line, or all of it."""
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="got|another record"):
        Journal(path, _only_numbers)
    assert path.read_bytes() == content
    # nothing is held either
    path.unlink()
    Journal(path, _only_numbers).close()


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that did not fit stays torn, so that a first one stops every run after it."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        file = journal._file

        class Full:
            def write(self, data: bytes) -> int:
                if len(data) < 12:
                    raise OSError("No space left on device")
                return file.write(data[:5])

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        with monkeypatch.context() as patch:
            patch.setattr(journal, "_file", Full())
            with pytest.raises(OSError, match="No space left"):
                journal.append({"number": 1})
        assert path.read_bytes() == b""
        journal.append({"number": 2})
    assert path.read_bytes() == b'{"number": 2}\n'


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A pipe in the file's place hangs the run."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a file"):
        Journal(tmp_path / "pipe")


@pytest.mark.parametrize("line", [b"{oh", b"[1]", b"\xff"])
def test_a_wrong_line_is_named_and_kept(line: bytes, tmp_path: Path) -> None:
    """A file of another kind would be cut, or continued."""
    path = tmp_path / "journal.jsonl"
    content = b'{"number": 1}\n' + line + b'\n{"number": 2}\n'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"must hold one JSON object a line, got .* on line 2"):
        Journal(path)
    assert path.read_bytes() == content


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    """Two runs would write the same conversations, or tear each other's lines."""
    path = tmp_path / "journal.jsonl"
    with Journal(path), pytest.raises(InUseError, match="must be written by one run at a time"):
        Journal(path)
    Journal(path).close()


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    """After a crash nobody could go on before removing a lock by hand."""
    path = tmp_path / "journal.jsonl"
    code = (
        "import runpy, sys, time; journal = runpy.run_path(sys.argv[2])['Journal'](sys.argv[1]); "
        "journal.append({'number': 1}); print('ready', flush=True); time.sleep(60)"
    )
    # the file alone, which needs nothing of the package
    source = sys.modules[Journal.__module__].__file__
    process = subprocess.Popen([sys.executable, "-c", code, str(path), str(source)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(InUseError):
            Journal(path)
    finally:
        os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.communicate()
    with Journal(path) as journal:
        assert journal.records == [{"number": 1}]
