"""What is learnt is shared by all calls of a process, also by those that run in other threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import RLock
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# one for all: they ask each other, take microseconds, and stay copyable without a lock of their own
_LOCK = RLock()


def in_turns(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Return `function` as one that waits while another thread is in any such function."""

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _LOCK:
            return function(*args, **kwargs)

    return run
