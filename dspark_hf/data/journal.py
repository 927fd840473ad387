"""A JSON Lines file that only grows, and stays whole whatever stops the program."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, BinaryIO

# behind every file's end: Windows bars others from reading what is locked
_LOCK_OFFSET = 1 << 40

# a power cut costs the lines of so many seconds at most
_COMMIT_SECONDS = 10.0


class InUseError(RuntimeError):
    """Another process writes to the same file; the message names it and the remedy."""


class Journal:
    """An append-only JSON Lines file, open for one process at a time.

    `records` holds what was in the file when it was opened. A last line that a crash left torn is cut off. The lock
    is the operating system's: it goes with the process, however that ends.

    Args:
        path: the file; it is made if it is not there.

    Raises:
        InUseError: if another process has it open.
        ValueError: if a line is no JSON object; the message names the line.

    Example:

        >>> with Journal(folder / "notes.jsonl") as journal:  # doctest: +SKIP
        ...     journal.append({"word": "hello"})
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._committed = monotonic()
        self._file: BinaryIO = self.path.open("a+b")
        try:
            self._lock()
            self.records = self._read()
        except BaseException:
            self._file.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one line; from here on a killed process loses it no more."""
        # half a character, which UTF-8 cannot hold, becomes JSON's own escape
        self._file.write(json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._file.flush()
        if monotonic() - self._committed > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Wait until all lines are on the disk; from here on a power cut loses them no more."""
        os.fsync(self._file.fileno())
        self._committed = monotonic()

    def close(self) -> None:
        """Commit, and let others have the file."""
        if not self._file.closed:
            self.commit()
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        if not _lock_file(self._file):
            raise InUseError(
                f"`{self.path}` must be written by one run at a time, got another run that has it open. Wait for that "
                "run, or name another file."
            )

    def _read(self) -> list[dict[str, Any]]:
        self._mend_tail()
        self._file.seek(0)
        records = [self._parse(line, number) for number, line in enumerate(self._file, start=1) if line.strip()]
        self._file.seek(0, os.SEEK_END)
        return records

    def _mend_tail(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        tail, start = b"", size
        while start and b"\n" not in tail:
            length = min(start, 1 << 16)
            start = self._file.seek(start - length)
            tail = self._file.read(length) + tail
        last = tail.rpartition(b"\n")[2]
        if not last:
            return
        try:
            # a whole object that lacks no more than its line feed
            _load_object(last)
            self._file.seek(0, os.SEEK_END)
            self._file.write(b"\n")
            self._file.flush()
        except ValueError:
            self._file.truncate(size - len(last))

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            return _load_object(line)
        except ValueError as error:
            raise ValueError(
                f"`{self.path}` must hold one JSON object a line, got {line[:60]!r} on line {number}. Correct or "
                "remove the line, or name another file."
            ) from error


def _load_object(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


if sys.platform == "win32":
    import msvcrt

    def _lock_file(file: BinaryIO) -> bool:
        file.seek(_LOCK_OFFSET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _lock_file(file: BinaryIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
