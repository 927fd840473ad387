"""What one test learnt of costs does not decide another."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_hf.generation.scheduling.costs import profile
from dspark_hf.generation.scheduling.costs.storing import FOLDER_VARIABLE


@pytest.fixture(autouse=True)
def no_known_costs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "profiles"))
    monkeypatch.setattr(profile, "_TABLES", {})
    monkeypatch.setattr(profile, "_QUICK", {})
    monkeypatch.setattr(profile, "_ONLINE", {})
