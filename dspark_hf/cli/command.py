"""Commands that need the whole package, and when it is loaded."""

from __future__ import annotations

import gc
import sys
from typing import Any

import typer
from typer.core import TyperCommand

from dspark_hf.console import printable


class PackageCommand(TyperCommand):
    """A command that loads the package once its arguments are understood, so that help and mistakes do not wait."""

    # Any: a context of click's, or of the copy of click inside newer versions of typer
    def invoke(self, ctx: Any) -> Any:
        load_package()
        gc.enable()
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            # it may quote a file, a server or a model
            error.message = printable(error.message)
            raise


def load_package() -> None:
    """Run `dspark_hf/__init__.py` if `dspark_hf_cli.main` has put that off; do nothing otherwise."""
    package = sys.modules["dspark_hf"]
    if vars(package).pop("_is_deferred", False):
        spec = package.__spec__
        assert spec is not None and spec.loader is not None
        try:
            spec.loader.exec_module(package)
        except BaseException:
            # as `import` does: a package that half works is worse than none
            del sys.modules["dspark_hf"]
            raise
