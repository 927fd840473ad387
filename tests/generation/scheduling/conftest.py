"""What one test learnt of costs does not decide another."""

from __future__ import annotations

import pytest

from dspark_hf.generation.scheduling.costs import profile


@pytest.fixture(autouse=True)
def no_known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_TABLES", {})
    monkeypatch.setattr(profile, "_QUICK", {})
    monkeypatch.setattr(profile, "_ONLINE", {})
