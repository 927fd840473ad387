"""One request to one server: no other is spoken to, and neither the reply's size nor its time is unbounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import anyio

# huggingface_hub brings one of the two, which are alike here, and either brings anyio
try:
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef]  # one of two

_MAX_ERROR_BYTES = 2000


class TooLongError(Exception):
    """The reply is longer than it may be."""


class NoReplyError(Exception):
    """There is no whole reply in time; the message says why."""


@dataclass(frozen=True)
class Reply:
    """What a server replied: `body` is whole for a success, and else its beginning."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


def open_client(num_connections: int) -> httpx.AsyncClient:
    """Return what sends requests, so many at once; it is to be used in `async with`."""
    # a deadline for the whole request takes the place of those for its parts, which begin anew with every byte
    return httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=num_connections))


async def send(
    client: httpx.AsyncClient,
    address: str,
    data: bytes | None,
    headers: Mapping[str, str],
    *,
    seconds: float,
    max_bytes: int,
) -> Reply:
    """Return the reply to a GET, or with `data` to a POST, whatever its status; redirects are not followed.

    Args:
        client: what sends.
        address: where to.
        data: what to send.
        headers: headers of the request.
        seconds: until the whole reply must be there; a server that sends a byte now and then does not change that.
        max_bytes: size of the body at most.

    Raises:
        NoReplyError: if there is no whole reply in time.
        TooLongError: if the body of a success is longer than `max_bytes`.
    """
    # what is unpacked has no size that is known before
    headers = {**headers, "Accept-Encoding": "identity"}
    parts, size = [], 0
    try:
        with anyio.fail_after(seconds):
            async with client.stream(
                "GET" if data is None else "POST", address, content=data, headers=headers
            ) as reply:
                most = max_bytes if reply.is_success else _MAX_ERROR_BYTES
                async for part in reply.aiter_raw():
                    size += len(part)
                    parts.append(part)
                    if size > most:
                        break
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise NoReplyError(str(error) or repr(error)) from error
    if size > most and reply.is_success:
        raise TooLongError
    return Reply(reply.status_code, reply.reason_phrase, reply.headers, b"".join(parts)[:most])
