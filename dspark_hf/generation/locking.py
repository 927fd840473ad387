"""One lock for everything a process learns, since calls in several threads share it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import RLock
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# A single lock: the functions call each other, take microseconds, and objects without a lock can be copied.
_LOCK = RLock()


def locked(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let only one thread at a time run any function decorated with this."""

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _LOCK:
            return function(*args, **kwargs)

    return run
