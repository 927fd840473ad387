"""One request from its body to its last byte."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dspark_hf.serving.answer import Answer, Ending
from dspark_hf.serving.engine import Engine
from dspark_hf.serving.errors import ApiError, shorten
from dspark_hf.serving.held_text import Delta
from dspark_hf.serving.metrics import Metrics
from dspark_hf.serving.model import ServedModel
from dspark_hf.serving.patience import ClientLeftError, EventStream, TimeOverError, finish_in_time, work_for_client
from dspark_hf.serving.processors import LogprobRecorder
from dspark_hf.serving.responses import ChatForm, TextForm, Usage
from dspark_hf.serving.sampling import read_options
from dspark_hf.serving.schemas import ChatBody, CompletionBody

_LOGGER = logging.getLogger(__name__)
# nobody reads it: the client has left
_CLIENT_LEFT = 499


@dataclass
class _Call:
    """A request that is being served."""

    answer: Answer
    prompt_length: int
    form: ChatForm | TextForm
    wants_usage: bool
    began: float
    has_begun: bool = False
    is_over: bool = False

    @property
    def usage(self) -> Usage:
        """Numbers of tokens so far."""
        return Usage(self.prompt_length, self.answer.num_tokens)


class Service:
    """Serve requests with an engine.

    Args:
        model: what is served.
        engine: what decodes.
        metrics: what counts.
        seconds: how long a request may take, waiting included.
    """

    def __init__(self, model: ServedModel, engine: Engine, metrics: Metrics, seconds: float):
        self._model, self._engine, self._metrics, self._seconds = model, engine, metrics, seconds
        # one thread: prompts are encoded in turns, while the loop goes on
        self._num_reading = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="dspark-hf reader")

    def close(self) -> None:
        """Let go of the thread that reads prompts."""
        self._reader.shutdown(cancel_futures=True)

    async def serve(self, body: ChatBody | CompletionBody, http: Request) -> Response:
        """Return the response to a request.

        Raises:
            ApiError: if it is not served.
        """
        began = time.monotonic()
        try:
            call = await self._begin(body, began)
        except ApiError as error:
            self._metrics.count_end(error.code if error.code == "queue_full" else "refused")
            raise
        except Exception as error:
            # a template is a program, which may fail in any way
            _LOGGER.exception("a prompt could not be read")
            self._metrics.count_end("error")
            raise ApiError(500, f"the prompt must be readable, got {type(error).__name__}. Change it.") from error
        try:
            return await (self._stream if body.stream else self._whole)(call, http)
        except ClientLeftError:
            return Response(status_code=_CLIENT_LEFT)

    async def _begin(self, body: ChatBody | CompletionBody, began: float) -> _Call:
        model = self._model
        if body.model != model.name:
            message = f"`model` must be {model.name!r} here, got {shorten(body.model)}. GET /v1/models tells it."
            raise ApiError(404, message, param="model", code="model_not_found")
        # before any work: prompts that wait to be read take memory, too
        self._engine.check_room(self._num_reading)
        ids = await self._read(body)
        end_ids = model.end_ids(body)
        recorder = None if body.num_logprobs is None else LogprobRecorder(body.num_logprobs)
        options = read_options(
            body,
            model.target.generation_config,
            prompt_length=len(ids),
            max_new_tokens=model.room(body, len(ids)),
            end_ids=end_ids,
            recorder=recorder,
            vocab_size=model.vocab_size,
        )
        answer = Answer(model.tokenizer, len(ids), end_ids=end_ids, stops=body.stops, recorder=recorder)
        form_class = ChatForm if isinstance(body, ChatBody) else TextForm
        form = form_class(model.name, wants_logprobs=recorder is not None, wants_usage=body.wants_usage)
        self._engine.submit(answer, ids, options)
        return _Call(answer, len(ids), form, body.wants_usage, began)

    async def _read(self, body: ChatBody | CompletionBody) -> list[int]:
        self._num_reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, self._model.read, body)
        finally:
            self._num_reading -= 1

    def _left(self, call: _Call) -> float:
        return call.began + self._seconds - time.monotonic()

    async def _whole(self, call: _Call, http: Request) -> Response:
        with self._ended_by_failure(call):
            delta = await work_for_client(self._collect(call), http.receive, self._left(call))
            reason = _reason(call.answer.ending)
        self._end(call, reason)
        return JSONResponse(call.form.whole(delta, reason, call.usage))

    @contextmanager
    def _ended_by_failure(self, call: _Call) -> Iterator[None]:
        """End a call whose answer fails inside the block, by what it failed of."""
        end = "cancelled"
        try:
            yield
            end = ""
        except TimeOverError:
            end = "timeout"
            raise self._time_over() from None
        except ApiError as error:
            end = "refused" if error.status == 400 else "error"
            raise
        finally:
            if end:
                self._end(call, end)

    async def _collect(self, call: _Call) -> Delta:
        whole = Delta()
        while (delta := await self._next(call)) is not None:
            whole += delta
        return whole

    async def _next(self, call: _Call) -> Delta | None:
        delta = await call.answer.next()
        if delta is not None and not call.has_begun:
            call.has_begun = True
            self._metrics.count_first(time.monotonic() - call.began)
        return delta

    async def _stream(self, call: _Call, http: Request) -> Response:
        # an error before the first text has a status of its own
        with self._ended_by_failure(call):
            first = await work_for_client(self._next(call), http.receive, self._left(call))
            if first is None:
                _reason(call.answer.ending)
        return EventStream(self._events(call, first), self._left(call), lambda: self._end(call, "cancelled"))

    async def _events(self, call: _Call, delta: Delta | None) -> AsyncGenerator[bytes, None]:
        end = "cancelled"
        try:
            if (opening := call.form.opening()) is not None:
                yield _event(opening)
            while delta is not None:
                yield _event(call.form.chunk(delta))
                delta = await finish_in_time(self._next(call), self._left(call))
            reason = _reason(call.answer.ending)
            end = reason
            yield _event(call.form.chunk(None, reason))
            if call.wants_usage:
                yield _event(call.form.usage_chunk(call.usage))
            yield b"data: [DONE]\n\n"
        except TimeOverError:
            end = "timeout"
            yield _event(self._time_over().body())
        except ApiError as error:
            end = "error"
            yield _event(error.body())
        finally:
            self._end(call, end)

    def _time_over(self) -> ApiError:
        message = f"an answer must be written within {self._seconds:g} seconds, got less of it. Ask for fewer tokens."
        return ApiError(504, message, code="timeout")

    def _end(self, call: _Call, end: str) -> None:
        """Count a request's end, the first time, and let go of what is still being written for it."""
        if call.is_over:
            return
        call.is_over = True
        self._engine.cancel(call.answer)
        ending = call.answer.ending
        self._metrics.count_end(end, time.monotonic() - call.began)
        self._metrics.count_tokens(
            call.prompt_length, call.answer.num_tokens, None if ending is None else ending.statistics
        )


def _reason(ending: Ending | None) -> str:
    """Return why an answer ended.

    Raises:
        ApiError: if it did not get as far.
    """
    assert ending is not None
    if ending.reason is not None:
        return ending.reason
    error = ending.error
    if isinstance(error, ApiError):
        raise error
    if isinstance(error, (ValueError, TypeError)):
        raise ApiError(400, str(error)) from error
    if error is not None:
        _LOGGER.error("a request failed", exc_info=error)
        raise ApiError(500, f"the target must get through, got {type(error).__name__}. The server's log says more.")
    raise ApiError(503, "the server must be running, got that it is being shut down.")


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n".encode("utf-8", "replace")
