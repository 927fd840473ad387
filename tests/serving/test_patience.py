"""How long a request is worked on."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from dspark_hf.serving.held_text import Delta
from dspark_hf.serving.patience import TimeOverError, finish_in_time
from dspark_hf.serving.responses import TextForm
from dspark_hf.serving.service import Service, _Call

SECONDS = 30.0


class _Answer:
    """An answer whose text comes when a test says so, and which never ends."""

    num_tokens, ending = 1, None

    def __init__(self) -> None:
        self.texts: asyncio.Queue[Delta] = asyncio.Queue()

    async def next(self) -> Delta:
        return await self.texts.get()


async def _pass_turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("num_turns", range(6))
def test_a_client_may_leave_as_text_comes(num_turns):
    """Text comes as the client is seen to leave, and its stream waits for more."""

    async def leave() -> bool:
        service, answer, left = Service(Mock(), Mock(), Mock(), SECONDS), _Answer(), asyncio.Event()
        call: Any = _Call(
            answer,  # type: ignore[arg-type]
            prompt_length=3,
            form=TextForm("tiny", wants_logprobs=False, wants_usage=False),
            wants_usage=False,
            began=time.monotonic(),
        )

        async def receive() -> dict[str, Any]:
            await left.wait()
            return {"type": "http.disconnect"}

        answer.texts.put_nowait(Delta("first"))
        http: Any = SimpleNamespace(receive=receive)
        response = await service._stream(call, http)
        stream = asyncio.ensure_future(response({"type": "http"}, receive, AsyncMock()))
        await _pass_turns(10)
        left.set()
        await _pass_turns(num_turns)
        answer.texts.put_nowait(Delta("second"))
        await asyncio.wait((stream,), timeout=SECONDS / 10)
        service.close()
        return stream.done() and call.is_over

    assert asyncio.run(leave())


@pytest.mark.parametrize("num_turns", range(6))
def test_a_cancellation_that_comes_with_the_result_is_not_lost(num_turns):
    """What waits is cancelled as the result comes, and goes on as if it had not been."""

    async def cancel() -> bool:
        result = asyncio.get_running_loop().create_future()

        async def wait() -> None:
            await finish_in_time(_of(result), SECONDS)
            await asyncio.sleep(0)
            await finish_in_time(asyncio.sleep(SECONDS), SECONDS)

        waiting = asyncio.ensure_future(wait())
        await _pass_turns(3)
        result.set_result(None)
        await _pass_turns(num_turns)
        waiting.cancel()
        await asyncio.wait((waiting,), timeout=SECONDS / 10)
        return waiting.cancelled()

    assert asyncio.run(cancel())


async def _of(result: Any) -> Any:
    return await result


def test_time_is_over():
    """What takes too long is waited for, or goes on behind the back of who waited."""

    async def wait() -> bool:
        never = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeOverError):
            await finish_in_time(_of(never), 0.01)
        assert await finish_in_time(asyncio.sleep(0, "in time"), SECONDS) == "in time"
        return never.cancelled()

    assert asyncio.run(wait())
