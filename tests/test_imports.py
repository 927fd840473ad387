"""Each module by itself, in a fresh interpreter."""

import importlib
import multiprocessing
import os
import pkgutil
import sys

import pytest
import torch  # noqa: F401
import transformers.generation  # noqa: F401

import dspark_hf

# its package is none of ours
WITHOUT = {"dspark_hf.__main__", "dspark_hf.evaluation.harness"}


def _import(name: str) -> None:
    for loaded in [one for one in sys.modules if one.split(".")[0] == "dspark_hf"]:
        del sys.modules[loaded]
    importlib.import_module(name)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes that have torch already")
def test_every_module_can_be_imported_first():
    """A module imports another one that needs it, so that who imports it first gets an error."""
    names = {one.name for one in pkgutil.walk_packages(dspark_hf.__path__, "dspark_hf.")} - WITHOUT
    assert len(names) > 150
    context = multiprocessing.get_context("fork")
    failed = []
    for name in sorted(names):
        process = context.Process(target=_import, args=(name,))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(name)
    assert not failed
