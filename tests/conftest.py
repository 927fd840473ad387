"""One thread, one seed, no stored profile and nothing learnt for every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dspark_hf.generation.scheduling import reset_learned_state
from dspark_hf.generation.scheduling.costs.storing import FOLDER_VARIABLE
from dspark_hf.registry.entries import DRAFTERS_VARIABLE

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_learnt() -> None:
    reset_learned_state()


@pytest.fixture(autouse=True)
def profiles(tmp_path: Path) -> Iterator[Path]:
    """The folder of measured profiles: none of this machine's is read, and none written."""
    folder = tmp_path / "profiles"
    # not the test's own `monkeypatch`, which would then outlive its other fixtures
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        yield folder


@pytest.fixture(autouse=True)
def own_drafters(tmp_path: Path) -> Iterator[Path]:
    """The registry file of the user's drafters, absent at first: none of this machine's is read, and none written."""
    file = tmp_path / "own-drafters.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DRAFTERS_VARIABLE, str(file))
        yield file
