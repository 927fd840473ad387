"""What is wrong with a file, in words, found before anything relies on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# a model's configuration has some kilobytes, the index of the largest checkpoints some megabytes
_MAX_JSON_BYTES = 64 << 20
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
        # checks that the tensors it names cover the file
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return f"holds no whole safetensors ({error})"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def index_files(path: Path) -> list[str]:
    """Return the names of the files that an index of weights lists.

    Raises:
        ValueError: if it lists none, or one outside of its folder; the message says what, without the file's name.
    """
    listed = read_object(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError("holds no `weight_map`")
    for name in listed.values():
        if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name or name in (".", ".."):
            raise ValueError(f"names {name!r:.60}, which is no file in its folder")
    return sorted(set(listed.values()))
