"""Old names of modules that moved."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from dspark_hf.moved import MOVED, new_name


@pytest.mark.parametrize("old", [*MOVED, "dspark_hf.chat.encoding", "dspark_hf.estimation.report"])
def test_old_names_give_the_module_in_its_new_place(old):
    """Code written for the last version breaks, or gets a second copy of classes that no longer match."""
    new = new_name(old)
    assert new is not None
    module = importlib.import_module(new)
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=new):
        found = importlib.import_module(old)
    assert found is module
    assert module.__spec__ is not None
    assert module.__spec__.name == module.__name__ == new


def test_new_names_say_nothing():
    """A fresh import of the package warns of names that it does not use, or finds modules that never were."""
    code = "import dspark_hf, dspark_hf.data.session, dspark_hf.modeling.deepseek_v4.chat"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:dspark_hf", "-c", code], check=True)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dspark_hf.chatter")
