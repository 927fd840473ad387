"""What is done when somebody asks for it: names that a folder offers, and work on modules that come later."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call `act` with the module `name`: now if it is imported, else as soon as it is.

    `act` runs in the middle of an import, so it should not import much itself.

    Example:

        >>> import json
        >>> when_imported("json", lambda module: print(module.__name__))
        json
    """
    module = sys.modules.get(name)
    # a module that is being imported now is in the table, too, but not whole
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        act(module)
        return
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _WaitingFinder)), None)
    if finder is None:
        finder = _WaitingFinder()
        sys.meta_path.insert(0, finder)
    finder.waiting.setdefault(name, []).append(act)


class _WaitingFinder(MetaPathFinder):
    """Let those who wait for a module act when it has run."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own spec, whose loader then calls those who wait; None for every other module."""
        if fullname not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return None
        # the loader's own type stays, since others ask for it
        run: Any = spec.loader.exec_module

        def run_and_act(module: ModuleType) -> None:
            run(module)
            for act in self.waiting.pop(fullname, ()):
                act(module)

        spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec
