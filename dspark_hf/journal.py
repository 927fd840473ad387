"""A JSON Lines file that only grows, and stays whole whatever stops the program."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

# a power cut costs the lines of so many seconds at most
_COMMIT_SECONDS = 10.0


class InUseError(RuntimeError):
    """Another process writes to the same file; the message names it and the remedy."""


class Journal:
    """An append-only JSON Lines file, open for one process at a time.

    `records` holds what was in the file when it was opened. A last line that a crash left torn is cut off, once all
    lines before it are known to be a journal's: a file of another kind is refused as it is. The lock is the operating
    system's: it goes with the process, however that ends.

    Args:
        path: the file; it is made if it is not there.
        check: raises a `ValueError` for a record, with its line's number, that is none of this journal's.

    Raises:
        InUseError: if another process has it open.
        ValueError: if it is no file, or a line is no JSON object of this journal; the message names the line.

    Example:

        >>> with Journal(folder / "notes.jsonl") as journal:  # doctest: +SKIP
        ...     journal.append({"word": "hello"})
    """

    def __init__(self, path: str | Path, check: Callable[[dict[str, Any], int], None] = lambda record, number: None):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"`{self.path}` must be a file, got something else of that name. Name another.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._check = check
        self._committed = monotonic()
        self._lock = _locked(self.path)
        try:
            # unbuffered: what could not be written is not tried again when the file is closed
            self._file = self.path.open("ab", buffering=0)
            try:
                self.records = self._read()
            except BaseException:
                self._file.close()
                raise
        except BaseException:
            self._lock.release()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one line; from here on a killed process loses it no more.

        Raises:
            OSError: if there is no room; the file is then as it was before.
        """
        # half a character, which UTF-8 cannot hold, becomes JSON's own escape
        self._write(json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        if monotonic() - self._committed > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Wait until all lines are on the disk; from here on a power cut loses them no more."""
        os.fsync(self._file.fileno())
        self._committed = monotonic()

    def close(self) -> None:
        """Commit, and let others have the file."""
        if not self._file.closed:
            try:
                self.commit()
            finally:
                self._file.close()
                self._lock.release()

    def discard(self) -> None:
        """Close and remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        size = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except BaseException:
            self._file.truncate(size)
            raise

    def _read(self) -> list[dict[str, Any]]:
        """Return the records; then, and not before, mend the last line."""
        records, tail, number = [], b"", 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    tail = line
                elif line.strip():
                    records.append(self._parse(line, number))
        if not tail.strip():
            return records
        is_torn = bool(records) and (tail.startswith(b"{") or not tail.strip(b"\0"))
        try:
            records.append(self._parse(tail, number))
        except _NoObjectError:
            if not is_torn:
                raise
            self._file.truncate(self._file.seek(0, os.SEEK_END) - len(tail))
        else:
            # a whole object that lacks no more than its line feed
            self._write(b"\n")
        return records

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._refusal(line, number) from error
        if not isinstance(record, dict):
            raise self._refusal(line, number)
        self._check(record, number)
        return record

    def _refusal(self, line: bytes, number: int) -> _NoObjectError:
        return _NoObjectError(
            f"`{self.path}` must hold one JSON object a line, got {line[:60]!r} on line {number}. Nothing in it "
            "was changed: correct or remove the line, or name another file."
        )


class _NoObjectError(ValueError):
    """A line is no JSON object."""


def _locked(path: Path) -> FileLock:
    # beside the file that it stands for, whatever link leads there
    real = path.resolve()
    lock = FileLock(real.with_name(f".{real.name[:200]}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InUseError(
            f"`{path}` must be written by one run at a time, got another run that has it open. Wait for that run, or "
            "name another file."
        ) from None
    return lock
