"""Old names of modules that moved."""

from __future__ import annotations

import importlib
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


def test_new_names_say_nothing(fresh):
    """A fresh import of the package warns of names that it does not use, or finds modules that never were."""
    code = (
        "import warnings; warnings.filterwarnings('error', category=DeprecationWarning, module='dspark_hf')\n"
        "import dspark_hf, dspark_hf.data.session, dspark_hf.modeling.deepseek_v4.chat"
    )
    result = fresh.run(code)
    assert result.returncode == 0, result.stderr
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dspark_hf.chatter")
