"""What a drafter's folder carries so that `trust_remote_code=True` works without `import dspark_hf`.

A shim lets Transformers load the installed class, and `custom_generate/generate.py` lets the folder be named in
`target.generate(..., custom_generate="folder")`.
"""

from __future__ import annotations

import os
from pathlib import Path

_SHIM_NAME = "dspark_hf_shim"
_SHIM = '''"""Load the installed `dspark_hf` package's classes; `pip install dspark-hf` provides them."""

from dspark_hf import DSparkAssistantModel, DSparkConfig

__all__ = ["DSparkAssistantModel", "DSparkConfig"]
'''

_GENERATE_FOLDER = "custom_generate"
_GENERATE = '''"""Generate with this repository's drafter; `pip install dspark-hf` does the work.

target.generate(**inputs, custom_generate="FOLDER_OR_REPOSITORY", trust_remote_code=True)
"""

import sys

import dspark_hf


def generate(model, drafter=None, **kwargs):
    """Return what `model.generate(**kwargs)` does, assisted by `drafter`: a model, or a folder's or hub's name."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    if drafter is None:
        # Transformers tells nobody which repository this is: the name stands in the frame that called
        drafter = sys._getframe(1).f_locals.get("custom_generate")
    if drafter is None:
        raise ValueError("`drafter` must be given here, got None. Pass the drafter, or its folder or hub name.")
    dspark_hf.install()
    return model.generate(assistant_model=drafter, **given)
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


def write_custom_generate(folder: str | os.PathLike) -> None:
    """Write `custom_generate/generate.py` and its `requirements.txt` into `folder`; what is there already stays."""
    path = Path(folder, _GENERATE_FOLDER)
    path.mkdir(parents=True, exist_ok=True)
    for name, text in (("generate.py", _GENERATE), ("requirements.txt", "dspark-hf\n")):
        if not (path / name).exists():
            (path / name).write_text(text, encoding="utf-8")
