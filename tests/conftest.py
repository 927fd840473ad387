"""One thread, one seed, no stored profile and nothing learnt for every test."""

import gc
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from dspark_hf import figures
from dspark_hf.generation.scheduling import reset_learned_state
from dspark_hf.generation.scheduling.costs.storing import FOLDER_VARIABLE
from dspark_hf.registry.entries import DRAFTERS_VARIABLE
from tests.fresh import FreshInterpreter

torch.set_num_threads(1)
_NUMBERS = count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what needs a fresh interpreter, so that one process starts it for all: that takes seconds."""
    items.sort(key=lambda item: "fresh" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported: PyTorch and Transformers are a million objects.

    It would look through all of them whenever a run of the trainer begins, half a second each time, and now and then
    anywhere else.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def coarse_figures() -> Iterator[None]:
    """Draw few pixels: nobody looks at the figures of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_RESOLUTION", 50)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_learnt() -> None:
    reset_learned_state()


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshInterpreter]:
    """An interpreter that has not imported the package."""
    interpreter = FreshInterpreter(tmp_path_factory.mktemp("fresh"))
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session")
def seldom_written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what tests seldom write: one of its own for each of thousands of tests takes longer than many."""
    return tmp_path_factory.mktemp("seldom")


@pytest.fixture(autouse=True)
def profiles(seldom_written: Path) -> Iterator[Path]:
    """The folder of measured profiles, absent at first: none of this machine's is read, and none written."""
    folder = seldom_written / f"{next(_NUMBERS)}-profiles"
    # not the test's own `monkeypatch`, which would then outlive its other fixtures
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        yield folder


@pytest.fixture(autouse=True)
def own_drafters(seldom_written: Path) -> Iterator[Path]:
    """The registry file of the user's drafters, absent at first: none of this machine's is read, and none written."""
    file = seldom_written / f"{next(_NUMBERS)}-own-drafters.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DRAFTERS_VARIABLE, str(file))
        yield file
