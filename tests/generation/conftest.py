"""What tests of packed weights share."""

from __future__ import annotations

import pytest

from dspark_hf.generation import packing
from dspark_hf.generation.packing import forget_packed


@pytest.fixture
def small_models_too(monkeypatch):
    """Pack however small a model is, and keep nothing for the next test."""
    monkeypatch.setattr(packing, "LEAST_BYTES", 0)
    yield
    forget_packed()
