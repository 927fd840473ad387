"""One request to one server: no other is spoken to, and neither the reply's size nor its time is unbounded."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from time import monotonic
from types import TracebackType
from typing import Any
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

_CHUNK = 1 << 16


class TooLongError(Exception):
    """The reply is longer than it may be."""


def send(address: str, data: bytes | None, headers: Mapping[str, str], *, seconds: float, max_bytes: int) -> bytes:
    """Return the body of the reply to a GET, or with `data` to a POST.

    Args:
        address: where to.
        data: what to send.
        headers: headers of the request; they are sent to `address` alone, since a redirect is an error.
        seconds: until the whole reply must be there; a server that sends a byte now and then does not change that.
        max_bytes: size of the body at most.

    Raises:
        HTTPError: for a status that is no success, redirects included.
        TooLongError: if the body is longer than `max_bytes`.
        OSError, HTTPException: if there is no whole reply in time.
    """
    with _Deadline(seconds) as deadline:
        opener = build_opener(_NoRedirects, _Http(deadline), _Https(deadline))
        parts, size = [], 0
        with opener.open(Request(address, data, dict(headers)), timeout=seconds) as reply:
            while part := reply.read1(_CHUNK):
                size += len(part)
                if size > max_bytes:
                    raise TooLongError
                parts.append(part)
            # a connection that was cut looks like an end
            if deadline.is_over or (reply.length or 0) > 0:
                raise HTTPException("the reply was not whole in time" if deadline.is_over else "half a reply")
        return b"".join(parts)


class _Deadline:
    """Cuts the connections it is given when the time is up: a socket's own timeout begins anew with every byte."""

    def __init__(self, seconds: float):
        self._end = monotonic() + seconds
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    @property
    def is_over(self) -> bool:
        return monotonic() >= self._end

    def watch(self, connection: HTTPConnection) -> None:
        """Cut this connection, too."""
        self._sockets.append(connection.sock)

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    def _cut(self) -> None:
        for one in self._sockets:
            # closed already
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow none: urllib would send the key along, wherever it leads."""


class _Http(HTTPHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: Request) -> Any:
        return self.do_open(_watched(HTTPConnection, self._deadline), req)


class _Https(HTTPSHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self._deadline = deadline

    def https_open(self, req: Request) -> Any:
        return self.do_open(_watched(HTTPSConnection, self._deadline), req)


def _watched(kind: type[HTTPConnection], deadline: _Deadline) -> Any:
    class Connection(kind):  # type: ignore[misc, valid-type]  # one of two classes
        def connect(self) -> None:
            super().connect()
            deadline.watch(self)

    return Connection
