"""Requests that wait for a row: a line of bounded length that one can also leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from queue import Full
from threading import Lock

from dspark_hf.generation.requests.request import Request


class WaitingLine(Iterator["Request | None"]):
    """Requests between the threads that bring them and the one that decodes.

    Other than a `RequestQueue` it never waits, whoever left makes room at once, and it outlives a stream: requests
    that were still waiting when the target failed are decoded by the next one.

    Args:
        max_waiting: requests that may wait.
    """

    def __init__(self, max_waiting: int):
        self._max_waiting = max_waiting
        self._requests: deque[Request] = deque()
        self._lock = Lock()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._requests)

    def put(self, request: Request) -> None:
        """Append a request.

        Raises:
            queue.Full: if there is no room.
            ValueError: if the line is closed.
        """
        with self._lock:
            if self._is_closed:
                raise ValueError("`put` must come before `close`, got a request for a closed line.")
            if len(self._requests) >= self._max_waiting:
                raise Full
            self._requests.append(request)

    def leave(self, request: Request) -> bool:
        """Take a request out; return whether it was still waiting."""
        with self._lock:
            try:
                self._requests.remove(request)
            except ValueError:
                return False
            return True

    def close(self) -> list[Request]:
        """Take no more; return those that wait."""
        with self._lock:
            self._is_closed = True
            waiting = list(self._requests)
            self._requests.clear()
            return waiting

    def __next__(self) -> Request | None:
        with self._lock:
            if self._requests:
                return self._requests.popleft()
            if self._is_closed:
                raise StopIteration
            return None
