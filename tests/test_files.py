"""What is written is whole, can be read by others, and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dspark_hf.damage import check_replaceable
from dspark_hf.files import replace_whole_folder, whole_file, write_whole, write_whole_folder

posix = pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _make_old(path: Path) -> Path:
    os.utime(path, (0, 0))
    return path


@posix
def test_files_have_the_mode_of_new_files_here(tmp_path: Path) -> None:
    """Others cannot read what is in a shared cache, or the mask of the whole process is touched to find it out."""
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", b"")

        def write(folder: Path) -> None:
            (folder / "weights").write_bytes(b"")
            (folder / "weights").chmod(0o600)

        write_whole_folder(tmp_path / "folder", write)
        with whole_file(tmp_path / "other") as partial:
            # as a library does that writes beside the file and renames
            partial.unlink()
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert [_mode(tmp_path / name) for name in ("file", "folder/weights", "other")] == [0o640] * 3


@posix
def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    """A private file is opened to all by being written again."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_whole(path, b"new")
    assert (path.read_bytes(), _mode(path)) == (b"new", 0o600)


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    """Each kill leaves a file for ever; or files that another process is writing, or that are no attempts, go too."""
    names = {
        "stale": ".file-0a1b2c3d.dspark-partial",
        "new": ".file-00000000.dspark-partial",
        "of another": ".other-0a1b2c3d.dspark-partial",
        "not ours": ".file-0a1b2c3d",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"half")
    for name in ("stale", "of another", "not ours"):
        _make_old(tmp_path / names[name])
    write_whole(tmp_path / "file", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"file", *names.values()} - {names["stale"]}


def test_what_is_not_ours_survives_a_replaced_folder(tmp_path: Path) -> None:
    """Notes beside a result go with the result that is replaced."""
    folder = tmp_path / "result"
    folder.mkdir()
    for name in ("config.json", "model-00001.safetensors", "thesis.txt"):
        (folder / name).write_text("old")

    def write(empty: Path) -> None:
        (empty / "config.json").write_text("new")

    replace_whole_folder(folder, write, lambda name: "safetensors" in name)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"config.json": "new", "thesis.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("name", ["result.json", "page.html"])
def test_only_an_earlier_result_is_written_over(name: str, tmp_path: Path) -> None:
    """Somebody's page in the folder that was named is replaced by ours, without a word."""
    check_replaceable("--output", tmp_path, "result.json", {"sets"}, "page.html")
    (tmp_path / "other.html").write_text("precious")
    check_replaceable("--output", tmp_path, "result.json", {"sets"}, "page.html")
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=f"`--output` must be a folder .*{name}', which would be written over"):
        check_replaceable("--output", tmp_path, "result.json", {"sets"}, "page.html")
    (tmp_path / "result.json").write_text('{"sets": [], "more": 1}')
    check_replaceable("--output", tmp_path, "result.json", {"sets"}, "page.html")
