"""Requests to decode, what becomes of them, and a bounded queue that brings them from other threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Full
from threading import Condition
from typing import Any

from torch import Tensor

from dspark_hf.generation.statistics import SpeculationStatistics


@dataclass(eq=False)
class Request:
    """A prompt, and how it is to be continued.

    Args:
        input_ids: the prompt, `(T,)` or `(1, T)`, or a list of ids.
        options: what `generate` would be called with for this prompt alone, `max_new_tokens=64` or `do_sample=True`,
            also processors, stopping criteria, a streamer.
        key: whatever helps you to tell requests apart.

    Example:

        >>> request = Request([5, 6, 7], {"max_new_tokens": 20, "do_sample": False}, key="first")
        >>> request.cancel()
        >>> request.key, request.is_cancelled
        ('first', True)
    """

    input_ids: Any
    options: dict[str, Any] = field(default_factory=dict)
    key: Any = None
    is_cancelled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.options = dict(self.options)

    def cancel(self) -> None:
        """Let the request end where it is, before the next round; any thread may say so, at any time."""
        self.is_cancelled = True


@dataclass(frozen=True, eq=False)
class FinishedRequest:
    """What became of a request.

    `token_ids` `(length,)` are the prompt and what was written, or None if the request did not get as far; `error` is
    what ended it early, or None; `statistics` are its own, times left out, since passes are shared.
    """

    request: Request
    token_ids: Tensor | None = None
    statistics: SpeculationStatistics | None = None
    error: BaseException | None = None


class RequestQueue:
    """A bounded queue between threads: many may `put`, one `generate_stream` takes.

    Args:
        max_waiting: requests that may wait; `put` blocks beyond.
    """

    def __init__(self, max_waiting: int = 64):
        self._max_waiting = max_waiting
        self._waiting: deque[Request] = deque()
        self._changed = Condition()
        self._is_closed = False

    def put(self, request: Request, timeout: float | None = None) -> None:
        """Add a request, as soon as there is room.

        Raises:
            queue.Full: if there was none for `timeout` seconds.
            ValueError: if the queue is closed.
        """
        with self._changed:
            has_come = self._changed.wait_for(
                lambda: self._is_closed or len(self._waiting) < self._max_waiting, timeout
            )
            if self._is_closed:
                raise ValueError("`put` must come before `close`, got a request for a closed queue.")
            if not has_come:
                raise Full
            self._waiting.append(request)

    def close(self) -> None:
        """Take no more requests; those that wait are still decoded."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Request | None]:
        return self

    def __next__(self) -> Request | None:
        with self._changed:
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.popleft()
            if self._is_closed:
                raise StopIteration
            return None
