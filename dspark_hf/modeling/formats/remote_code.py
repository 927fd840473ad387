"""The shim that lets `trust_remote_code=True` load the installed class without `import dspark_hf`."""

from __future__ import annotations

import os
from pathlib import Path

_SHIM_NAME = "dspark_hf_shim"
_SHIM = '''"""Load the installed `dspark_hf` package's classes; `pip install dspark-hf` provides them."""

from dspark_hf import DSparkAssistantModel, DSparkConfig

__all__ = ["DSparkAssistantModel", "DSparkConfig"]
'''

AUTO_MAP = {
    "AutoConfig": f"{_SHIM_NAME}.DSparkConfig",
    "AutoModel": f"{_SHIM_NAME}.DSparkAssistantModel",
    "AutoModelForCausalLM": f"{_SHIM_NAME}.DSparkAssistantModel",
}


def write_shim(folder: str | os.PathLike) -> None:
    """Write the file that `AUTO_MAP` names into `folder`."""
    path = Path(folder, f"{_SHIM_NAME}.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_SHIM, encoding="utf-8")
