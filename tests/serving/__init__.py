"""Tests of the server; skipped where its packages are not installed."""

import pytest

for package in ("fastapi", "uvicorn", "openai", "prometheus_client"):
    pytest.importorskip(package)
