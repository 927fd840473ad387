"""`dspark-hf`: the command line, which says what it can do before it loads PyTorch.

Importing `dspark_hf` takes seconds, since it registers models with Transformers and extends `generate`. Help, versions
and mistyped options need none of that. Python imports a package in two steps: it makes the module, then runs
`dspark_hf/__init__.py` in it. `main` takes the first step alone, which suffices to import `dspark_hf.cli`; a command
that needs the package takes the second before it begins (`dspark_hf/cli/command.py`). This file lies beside the
package, because anything inside would have to wait for it.
"""

from __future__ import annotations

import gc
import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    """Run the command that the arguments of this process ask for."""
    # nothing that is imported now is garbage, and looking for some takes a tenth of the time until help is told;
    # `dspark_hf/cli/command.py` lets the collector work again
    gc.disable()
    if "dspark_hf" not in sys.modules:
        spec = find_spec("dspark_hf")
        if spec is None:
            raise ModuleNotFoundError("No module named 'dspark_hf'", name="dspark_hf")
        package = module_from_spec(spec)
        # read in dspark_hf/cli/command.py
        vars(package)["_is_deferred"] = True
        sys.modules["dspark_hf"] = package
    # imported here: before the lines above it would bring the whole package
    from dspark_hf.cli.main import app

    app()
