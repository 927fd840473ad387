"""Files and folders that are whole or absent, whatever interrupts their writing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader never sees half of it; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a file that is replaced keeps its mode
        os.chmod(partial, path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_whole_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill an empty folder, then move it to `folder`, which must be absent or empty.

    Where another process wrote a folder there in the meantime, that one stays: it is as whole as ours.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as workspace:
        partial = Path(workspace, "folder")
        partial.mkdir()
        write(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
