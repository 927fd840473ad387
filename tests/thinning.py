"""What `make test` tries of many combinations that show the same thing; `make test-all` tries each of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return one parameter set that only the slow run tries."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mostly_slow(names: Iterable[str], quick: Iterable[str]) -> list[Any]:
    """Return `names` as parameters, of which only those in `quick` run every time.

    Raises:
        ValueError: If `quick` holds a name that is not among `names`, which would then run nowhere.
    """
    names, quick = list(names), set(quick)
    if not quick <= set(names):
        raise ValueError(f"`quick` must be among {names}, got {sorted(quick - set(names))}.")
    return [name if name in quick else slow(name) for name in names]
