"""What is wrong with a file, in words, found before anything relies on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

# a model's configuration has some kilobytes, the index of the largest checkpoints some megabytes
_MAX_JSON_BYTES = 64 << 20
_MAX_LINE = 64 << 20
# what is often found in the place of weights, by its first bytes
_NO_WEIGHTS = {
    b"version https://git-lfs": "is a Git LFS pointer in the place of the weights: fetch them with `git lfs pull`",
    b"<": "is a web page in the place of the weights: download them again",
}


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        ValueError: if it holds something else; the message says what, without the file's name.
    """
    if not path.is_file():
        raise ValueError("is no file")
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
        if len(content) > _MAX_JSON_BYTES:
            raise ValueError(f"holds more than {_MAX_JSON_BYTES >> 20} MiB")
        fields = json.loads(content)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"holds the byte {content[error.start]:#04x}, which is no UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError("is empty" if not content.strip() else f"holds no JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("holds JSON that is too deep") from error
    if not isinstance(fields, dict):
        raise ValueError(f"holds no JSON object but {fields!r:.60}")
    return fields


def check_replaceable(option: str, folder: Path, result: str, fields: set[str], *others: str) -> None:
    """Raise a `ValueError` if writing a result into a folder would write over what is no earlier result.

    Args:
        option: the command's option that names the folder.
        folder: where to.
        result: the file of JSON that every result has.
        fields: what it holds at least.
        others: files that are written beside it.
    """
    there = [name for name in (result, *others) if (folder / name).exists() or (folder / name).is_symlink()]
    if not there:
        return
    try:
        is_earlier_result = fields <= read_object(folder / result).keys()
    except ValueError:
        is_earlier_result = False
    if not is_earlier_result:
        raise ValueError(
            f"`{option}` must be a folder with an earlier result or without one, got {str(folder / there[0])!r}, "
            f"which would be written over, and no {result} of ours. Name another folder."
        )


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of every line that is not empty.

    Raises:
        ValueError: if it is no file, or a line is no UTF-8 or longer than any text; the message names the line.
    """
    if not path.is_file():
        raise ValueError(f"`{path}` must be a file, got something else of that name. Correct the path.")
    # what is no UTF-8 becomes halves of characters, which cannot be encoded again
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        number = 0
        while line := lines.readline(_MAX_LINE):
            number += 1
            if len(line) == _MAX_LINE:
                raise ValueError(f"`{path}` must hold shorter lines, got {_MAX_LINE:,} characters on line {number}.")
            if not is_text(line):
                byte = next(character for character in line if not is_text(character))
                raise ValueError(
                    f"`{path}` must be UTF-8, got the byte {ord(byte) & 0xFF:#04x} on line {number}. Save the file as "
                    "UTF-8, or remove the line."
                )
            if line.strip():
                yield number, line


def parse_line(path: Path, number: int, line: str, remedy: str) -> Any:
    """Return the JSON of one line of a file.

    Raises:
        ValueError: if it is none; the message names file and line.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        why = "too deep" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
        raise ValueError(
            f"`{path}` must hold one JSON object a line, got {line.strip()[:60]!r} on line {number} ({why}). {remedy}"
        ) from error


def is_text(value: Any) -> bool:
    """Return whether a value is a text that can be written: JSON's escapes may stand for halves of characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def weights_damage(path: Path) -> str | None:
    """Return what is wrong with a file of safetensors, as the end of a sentence about it, or None.

    The header is read, and whether the file is as long as the header says; not the numbers.
    """
    if not path.is_file():
        return "is no file"
    try:
        with path.open("rb") as file:
            start = file.read(64)
        for sign, words in _NO_WEIGHTS.items():
            if start.startswith(sign):
                return words
        if not start:
            return "is empty"
        # checks that the tensors it names cover the file
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return f"holds no whole safetensors ({error})"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def read_weight_map(path: Path) -> dict[str, str]:
    """Return the file of every tensor, below the index's own folder, as an index of weights names them.

    Raises:
        ValueError: if it names none, or one outside of its folder; the message says what, without the file's name.
    """
    listed = read_object(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError("holds no `weight_map`")
    for name in listed.values():
        if not isinstance(name, str) or not _is_inside(name):
            raise ValueError(f"names {name!r:.60}, which is no file in its folder")
    return listed


def index_files(path: Path) -> list[str]:
    """Return the names of the files that an index of weights lists.

    Raises:
        ValueError: as `read_weight_map`.
    """
    return sorted(set(read_weight_map(path).values()))


def _is_inside(name: str) -> bool:
    # what Windows takes for a path counts everywhere
    parts = [part for path in (PurePosixPath(name), PureWindowsPath(name)) for part in (path.anchor, *path.parts)]
    return any(parts) and not any(PureWindowsPath(part).anchor or part == ".." for part in parts)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [""])[0]
