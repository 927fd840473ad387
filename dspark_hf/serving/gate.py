"""What every request passes first: the key, the name it was sent to, and a bound on its body."""

from __future__ import annotations

import hmac
import re

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_hf.serving.errors import ApiError
from dspark_hf.serving.patience import TimeOverError, finish_in_time

# whoever watches the server needs no key for this
_OPEN_PATHS = ("/health",)
_BODY_SECONDS = 30.0
# how this machine calls itself
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


class Gate:
    """Let requests through that have the key, and whose bodies are small and come in time.

    Args:
        app: what answers them.
        api_key: the key, or None: everybody may ask.
        max_body_bytes: size of a body at most.
        is_local: whether a request must have been sent to a name of this machine itself. A page in a browser can let
            its own name lead here, and would then be answered.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int, is_local: bool = False):
        self._app, self._max_body_bytes, self._is_local = app, max_body_bytes, is_local
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            self._check_key(scope["path"], headers)
            self._check_host(headers)
            body = await self._read(headers, receive)
        except ApiError as error:
            # what is left of the body is not read
            closing = {**error.headers, "Connection": "close"}
            await JSONResponse(error.body(), error.status, closing)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._expected is None or path in _OPEN_PATHS:
            return
        # in constant time: how long it takes says nothing of how much is right
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            message = "the header `Authorization` must be `Bearer KEY` with the server's key, got another. Correct it."
            raise ApiError(401, message, code="invalid_api_key")

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        # without the port; IPv6 has brackets
        host = re.sub(rb":\d+$", b"", headers.get(b"host", b"")).strip(b"[]")
        if self._is_local and host.decode("latin-1").lower() not in LOCAL_HOSTS:
            raise ApiError(
                403,
                f"the header `Host` must be one of {', '.join(LOCAL_HOSTS)} for a server without a key, got another. "
                "Set a key (DSPARK_HF_API_KEY).",
            )

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Return the whole body; None if the client left."""
        said = headers.get(b"content-length", b"0")
        if said.isdigit() and int(said) > self._max_body_bytes:
            raise self._too_large()
        try:
            return await finish_in_time(self._collect(receive), _BODY_SECONDS)
        except TimeOverError:
            message = f"the body must come within {_BODY_SECONDS:.0f} seconds, got less of it. Send it again."
            raise ApiError(408, message) from None

    async def _collect(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body must have at most {self._max_body_bytes} bytes, got more. Shorten it.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives the body once, and then what comes after it: that the client leaves."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
