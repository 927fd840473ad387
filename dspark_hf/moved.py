"""Old names of modules that moved: they still work, and say where the module is now."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# of version 0.1; what is below a folder moved with it
MOVED = {
    "dspark_hf.chat": "dspark_hf.modeling.deepseek_v4.chat",
    "dspark_hf.estimation": "dspark_hf.modeling.deepseek_v4.estimation",
    "dspark_hf.generation.request_queue": "dspark_hf.generation.requests.request",
    "dspark_hf.generation.request_stream": "dspark_hf.generation.requests.stream",
    "dspark_hf.generation.outputs": "dspark_hf.generation.call.outputs",
    "dspark_hf.generation.passes": "dspark_hf.generation.targets.interface",
    "dspark_hf.generation.target": "dspark_hf.generation.targets.adapter",
    "dspark_hf.generation.scheduling.profile": "dspark_hf.generation.scheduling.costs.profile",
    "dspark_hf.modeling.conversion": "dspark_hf.modeling.formats.deepspec",
    "dspark_hf.modeling.remote_code": "dspark_hf.modeling.formats.remote_code",
    "dspark_hf.modeling.deepseek_v4.checkpoint": "dspark_hf.modeling.deepseek_v4.checkpoints.released",
    "dspark_hf.modeling.deepseek_v4.loading": "dspark_hf.modeling.deepseek_v4.checkpoints.loading",
    "dspark_hf.modeling.deepseek_v4.saving": "dspark_hf.modeling.deepseek_v4.checkpoints.saving",
    "dspark_hf.profiling.storing": "dspark_hf.generation.scheduling.costs.storing",
    "dspark_hf.profiling.table": "dspark_hf.generation.scheduling.costs.table",
    "dspark_hf.training.collecting": "dspark_hf.data.session",
    "dspark_hf.training.collection": "dspark_hf.data.collection",
    "dspark_hf.training.data": "dspark_hf.training.conversations",
    "dspark_hf.training.server": "dspark_hf.data.server",
    "dspark_hf.training.sources": "dspark_hf.data.sources",
    "dspark_hf.training.writing": "dspark_hf.data.writers",
}


def new_name(name: str) -> str | None:
    """Return where a module that moved is now, or None.

    Example:

        >>> new_name("dspark_hf.chat.encoding")
        'dspark_hf.modeling.deepseek_v4.chat.encoding'
    """
    parts = name.split(".")
    # a folder, or a module in it
    for count in range(len(parts), 1, -1):
        folder = MOVED.get(".".join(parts[:count]))
        if folder is not None:
            return ".".join([folder, *parts[count:]])
    return None


class _MovedLoader(Loader):
    def __init__(self, name: str):
        self._name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # the module has run under its own name, which the import system has just replaced
        module.__spec__ = self._spec


class MovedFinder(MetaPathFinder):
    """Find modules by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec that gives the module in its new place, or None if `fullname` is no old name."""
        new = new_name(fullname) if fullname.startswith("dspark_hf.") else None
        if new is None:
            return None
        warnings.warn(f"`{fullname}` moved: import `{new}`.", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, _MovedLoader(new))


def install_old_names() -> None:
    """Let imports of old names find what moved; calling it again is harmless."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        # first, or a moved folder's modules would be loaded a second time under their old names
        sys.meta_path.insert(0, MovedFinder())
