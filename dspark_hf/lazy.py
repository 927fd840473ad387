"""Names that a folder offers, imported when somebody asks for them: importing one file does not load them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package whose names lie in its modules; `places` says where, by name.

    Example:

        >>> find = lazy_names("json", {"JSONDecoder": "decoder"})
        >>> find("JSONDecoder")().decode("[1, 2]")
        [1, 2]
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{places[name]}"), name)

    return find
