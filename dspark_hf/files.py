"""Files and folders that are whole or absent, whatever interrupts their writing."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time

# what a killed process left behind: nothing takes so long to write
_STALE_SECONDS = 24 * 3600
_SUFFIX = ".dspark-partial"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader never sees half of it; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent, path.name)
    with whole_file(path) as partial:
        partial.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the path of an empty file beside `path`, which takes its place when the block has filled it.

    A file that is replaced keeps its mode, whatever wrote the new one.
    """
    partial = path.with_name(f"{_start(path.name)}{secrets.token_hex(4)}{_SUFFIX}")
    # made as any file is made, so that it has the mode that new files have here
    partial.open("xb").close()
    try:
        mode = (path if path.exists() else partial).stat().st_mode & 0o7777
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.chmod(mode)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill an empty folder, then move it to `folder`, which must be absent or empty.

    Where another process wrote a folder there in the meantime, that one stays: it is as whole as ours.
    """
    with _filled_folder(folder, write) as partial:
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def replace_whole_folder(folder: Path, write: Callable[[Path], None], is_own: Callable[[str], bool]) -> None:
    """Let `write` fill an empty folder, then let it take the place of `folder`.

    What lies in the old folder under a name that the new one has, or that `is_own` knows, is given up; everything else
    is somebody else's, and moves over.
    """
    with _filled_folder(folder, write) as partial:
        if not folder.exists():
            partial.rename(folder)
            return
        old = partial.with_name("old")
        folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        for path in old.iterdir():
            if not (is_own(path.name) or (folder / path.name).exists()):
                path.rename(folder / path.name)


@contextmanager
def _filled_folder(folder: Path, write: Callable[[Path], None]) -> Iterator[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(folder.parent, folder.name)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_start(folder.name), suffix=_SUFFIX) as workspace:
        partial = Path(workspace, "folder")
        partial.mkdir()
        write(partial)
        _open_to_readers(partial)
        yield partial


def _open_to_readers(folder: Path) -> None:
    """Give files that only their owner can read the mode that new files have here."""
    probe = folder / f".{secrets.token_hex(4)}{_SUFFIX}"
    # safetensors 0.8 writes for the owner alone, and nobody else could use a shared cache
    probe.open("xb").close()
    mode = probe.stat().st_mode & 0o7777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and not path.stat().st_mode & 0o077:
            path.chmod(mode)


def remove_stale(folder: Path, name: str | None = None) -> None:
    """Remove what processes that were killed long ago have left of their attempts to write into `folder`.

    Args:
        folder: where to look.
        name: the file or folder they meant to write; None for any.
    """
    start = "." if name is None else _start(name)
    for path in folder.iterdir():
        if not (path.name.startswith(start) and path.name.endswith(_SUFFIX)):
            continue
        try:
            if time() - path.lstat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError:
            # another process was faster, or it is not ours to remove
            continue


def _start(name: str) -> str:
    # a file system's names have an end
    return f".{name[:200]}-"
