"""A file of records survives crashes and has one writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_hf.data.journal import InUseError, Journal


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


def test_a_file_that_is_all_torn_becomes_empty(tmp_path: Path) -> None:
    """A crash in the first line would stop every run after it."""
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"number"')
    with Journal(path) as journal:
        assert journal.records == []
    assert path.read_bytes() == b""


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
        "import sys, time; from dspark_hf.data.journal import Journal; journal = Journal(sys.argv[1]); "
        "journal.append({'number': 1}); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
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
