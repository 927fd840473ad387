"""How long a request is worked on: until its client leaves, or its time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
# what a client that reads slowly gets beyond its time, to be told so
_GRACE_SECONDS = 5.0


class ClientLeftError(Exception):
    """The client has closed the connection."""


class TimeOverError(Exception):
    """The request's time is over."""


async def finish_in_time(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Return what `work` gives, which ends early if `seconds` are over or whoever waits here is cancelled.

    Unlike `asyncio.wait_for` before Python 3.12, this never loses a cancellation that comes with the result.

    Raises:
        TimeOverError: if it took longer.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=max(seconds, 0.0))
        if task.done():
            return task.result()
        raise TimeOverError
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def work_for_client(work: Coroutine[Any, Any, T], receive: Receive, seconds: float) -> T:
    """Return what `work` gives, which ends early if the client leaves or `seconds` are over.

    Raises:
        ClientLeftError: if the client left.
        TimeOverError: if it took longer.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_leaving(receive))
    try:
        await asyncio.wait((task, leaving), timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError if leaving.done() else TimeOverError
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _wait_for_leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events for as long as the client stays, whatever version of Starlette sends them.

    Args:
        events: gives the events; closed when the client leaves, too.
        seconds: how long that may take.
        finish: called at the end, even if no event was asked for.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Any, seconds: float, finish: Callable[[], None]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._seconds, self._finish = events, seconds, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await work_for_client(self.stream_response(send), receive, self._seconds + _GRACE_SECONDS)
        except (ClientLeftError, TimeOverError, OSError):
            # nobody is left to be told
            return
        finally:
            await self._events.aclose()
            self._finish()
