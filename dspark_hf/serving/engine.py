"""The thread that owns the model: it decodes all requests in one running batch, and goes on when a round fails."""

from __future__ import annotations

import logging
from queue import Full
from threading import Lock, Thread
from typing import Any

from transformers import PreTrainedModel

from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.requests.request import FinishedRequest, Request
from dspark_hf.generation.requests.stream import RequestStream, generate_stream
from dspark_hf.serving.answer import Answer
from dspark_hf.serving.errors import ApiError
from dspark_hf.serving.waiting import WaitingLine

_LOGGER = logging.getLogger(__name__)
# rounds that fail in a row, without a request that got through, before the machine is taken for broken
_MOST_FAILURES = 3
_BROKEN = "the target fails again and again. Restart the server."


class Engine:
    """Decode requests that come and go, each in its own row.

    Args:
        target: the target.
        drafter: what drafts for it, or None.
        max_rows: requests that are decoded at the same time.
        max_waiting: requests that may wait for a row.
        retry_after: seconds after which a client that was turned away may try again.
        scheduler: as in `generate_stream`.
        num_drafts: drafts of a round at most, `num_assistant_tokens` of every request; None: the drafter's block size.

    Raises:
        ValueError: if the target cannot be decoded row by row, its generation configuration asks for what a stream
            does not do, or the drafter does not fit.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: Drafter | None = None,
        *,
        max_rows: int = 8,
        max_waiting: int = 64,
        retry_after: int = 2,
        scheduler: str | None = None,
        num_drafts: int | None = None,
    ):
        self._target, self._drafter = target, drafter
        self._max_rows, self._max_waiting, self._retry_after = max_rows, max_waiting, retry_after
        self._scheduler = scheduler
        self._knobs = {} if num_drafts is None else {"num_assistant_tokens": num_drafts}
        self._line = WaitingLine(max_waiting)
        self._open: set[Request] = set()
        self._lock = Lock()
        self._num_failures = 0
        self._thread = Thread(target=self._run, name="dspark-hf engine", daemon=True)
        self._down: str | None = None
        self._try()

    @property
    def down(self) -> str | None:
        """Why nothing is decoded any more, or None."""
        return self._down

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._line)

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return max(len(self._open) - len(self._line), 0)

    def start(self) -> None:
        """Start to decode."""
        self._thread.start()

    def check_room(self, num_before: int = 0) -> None:
        """Raise what `submit` would raise now, had `num_before` others been submitted before."""
        if self._down is not None:
            raise self._not_running()
        if len(self._line) + num_before >= self._max_waiting:
            raise self._full()

    def _full(self) -> ApiError:
        return ApiError(
            429,
            f"the server must have room for a request, got {self._max_waiting} that wait. Try again later.",
            code="queue_full",
            retry_after=self._retry_after,
        )

    def _not_running(self) -> ApiError:
        return ApiError(503, f"the server must be running, got that {self._down}")

    def submit(self, answer: Answer, input_ids: list[int], options: dict[str, Any]) -> None:
        """Let a request wait for a row.

        Raises:
            ApiError: if too many wait already, or nothing is decoded any more.
        """
        self.check_room()
        request = _request(input_ids, {**options, **self._knobs, "streamer": answer}, answer)
        answer.request = request
        try:
            with self._lock:
                self._line.put(request)
                self._open.add(request)
        except Full:
            raise self._full() from None
        except ValueError:
            raise self._not_running() from None

    def cancel(self, answer: Answer) -> None:
        """Let a request end where it is; nothing happens to one that has ended."""
        request = answer.request
        if request is None:
            return
        request.cancel()
        if self._line.leave(request):
            self._report(FinishedRequest(request))

    def close(self) -> None:
        """Cancel everything, and wait until the thread has ended."""
        self._shut("it is being shut down.")
        with self._lock:
            inside = list(self._open)
        for request in inside:
            request.cancel()
        if self._thread.is_alive():
            self._thread.join()

    def _shut(self, reason: str) -> None:
        self._down = self._down or reason
        for request in self._line.close():
            self._report(FinishedRequest(request, error=self._not_running()))

    def _run(self) -> None:
        try:
            while self._down is None:
                self._decode()
        finally:
            # whatever ended the thread: nobody waits for ever
            self._shut(_BROKEN)

    def _decode(self) -> None:
        """Decode until the line is closed, or a round fails."""
        stream = self._new_stream(self._line)
        try:
            for finished in stream:
                self._report(finished)
                if finished.error is None:
                    self._num_failures = 0
                elif _breaks_device(finished.error):
                    raise finished.error
        except Exception as error:
            _LOGGER.exception("a round failed: its requests are told, the others go on")
            self._num_failures += 1
            if self._num_failures >= _MOST_FAILURES or _breaks_device(error):
                self._down = _BROKEN
        finally:
            for finished in stream.close():
                self._report(finished)

    def _try(self) -> None:
        """Decode a token before anybody is promised anything: what no request could have is an error at once."""
        (finished,) = self._new_stream([_request([0], {"max_new_tokens": 1, "do_sample": False, **self._knobs})])
        if finished.error is not None:
            raise finished.error

    def _new_stream(self, requests: Any) -> RequestStream:
        return generate_stream(
            self._target, requests, drafter=self._drafter, max_rows=self._max_rows, scheduler=self._scheduler
        )

    def _report(self, finished: FinishedRequest) -> None:
        with self._lock:
            self._open.discard(finished.request)
        finished.request.key.finish(finished)


def _request(input_ids: list[int], options: dict[str, Any], answer: Answer | None = None) -> Request:
    # without a mask `generate` takes tokens for padding that look like it
    return Request(input_ids, {**options, "attention_mask": [1] * len(input_ids)}, answer)


def _breaks_device(error: BaseException) -> bool:
    """Return whether an accelerator is of no more use to this process, as after an index out of range."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
