"""Let a server of the target write: any that speaks OpenAI's protocol, such as vLLM, SGLang or llama.cpp."""

from __future__ import annotations

import json
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from dspark_hf.data.writers import Answer, Sampling
from dspark_hf.prompts import Prompt

API_KEY_VARIABLE = "DSPARK_HF_API_KEY"

# the server is busy, restarting, or behind a proxy that says so
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_MAX_DELAY = 60.0


class ServerError(RuntimeError):
    """The server cannot be used, or does not answer as it should; the message says what to do."""


class ServerWriter:
    """A served target that writes.

    Requests that fail for a passing reason are sent again, after 1, 2, 4 ... seconds or when the server says. The key,
    if the server wants one, is read from the environment variable `DSPARK_HF_API_KEY` and is written nowhere.

    A server knows the text it wrote; its tokens it tells only if it knows the field `return_token_ids`, as vLLM does.

    Args:
        url: the server's address, with or without `/v1`.
        model: the name it serves the target under.
        num_workers: requests at once.
        timeout: seconds until an answer must be there.
        num_tries: how often a request is sent before the run gives up.
        first_delay: seconds before the second try.
        asks_for_token_ids: whether to send `return_token_ids`; other servers may refuse a field they do not know.

    Raises:
        ValueError: if `url` is no address.

    Example:

        >>> writer = ServerWriter("http://localhost:8000", "Qwen/Qwen3-8B")
        >>> writer.check()  # doctest: +SKIP
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        num_workers: int = 32,
        timeout: float = 600.0,
        num_tries: int = 6,
        first_delay: float = 1.0,
        asks_for_token_ids: bool = False,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(
                f"`server` must be an http address, got {url!r}. Write for example http://localhost:8000."
            )
        # a worker that is done with its own goes on with others': a batch of many shares waits for few
        self.batch_size = 16 * num_workers
        self._url = url.rstrip("/") if parts.path.rstrip("/") else url.rstrip("/") + "/v1"
        self._model = model
        self._num_workers = num_workers
        self._timeout = timeout
        self._num_tries = num_tries
        self._first_delay = first_delay
        self._asks_for_token_ids = asks_for_token_ids

    def check(self) -> None:
        """Ask the server for its models.

        Raises:
            ServerError: if it cannot be reached, or does not serve the target.
        """
        try:
            listed = self._send("/models", None, threading.Event())
        except _RefusedError as error:
            if error.status in (404, 405):
                # not every server lists its models
                return
            raise
        models = [model.get("id") for model in listed.get("data") or [] if isinstance(model, dict)]
        if models and self._model not in models:
            raise ServerError(
                f"`model` must be served by {self._url}, got {self._model!r}, where there are {models[:8]}. Name "
                "one of them."
            )

    def write(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, max_new_tokens: int, seed: int, stop: str = ""
    ) -> Iterator[tuple[int, Answer]]:
        """Yield each prompt's index and its answer, as `Writer.write` says.

        Raises:
            ServerError: if a request fails for good; the answers that were ready have been yielded.
        """
        options = {
            "model": self._model,
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **({"stop": [stop]} if stop else {}),
            **({"return_token_ids": True} if self._asks_for_token_ids else {}),
        }

        def ask(index: int, stopping: threading.Event) -> Answer:
            # another seed for each: the same prompt may be among them several times
            return self._ask(prompts[index], {**options, "seed": (seed + index) % (1 << 31)}, stopping)

        return _in_threads(ask, len(prompts), self._num_workers)

    def _ask(self, prompt: Prompt, options: Mapping[str, Any], stopping: threading.Event) -> Answer:
        if prompt.messages is None:
            return self._send("/completions", {**options, "prompt": prompt.text}, stopping, _read_answer)
        body = {**options, "messages": list(prompt.messages)}
        return self._send("/chat/completions", body, stopping, _read_answer)

    def _send(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        stopping: threading.Event,
        read: Callable[[Any], Any] = lambda reply: reply,
    ) -> Any:
        """Send a request until the server replies with something that `read` understands; return what it read."""
        delay = self._first_delay
        for number in range(1, self._num_tries + 1):
            try:
                return read(self._send_once(path, body))
            except _PassingError as error:
                if number == self._num_tries or stopping.is_set():
                    raise ServerError(
                        f"`server` must answer, got {error} from {self._url}{path}, {number} times. Check that it is "
                        "running, then run the same command again: it goes on where it was."
                    ) from error
                # not all workers at the same moment
                stopping.wait(min(error.delay or delay * random.uniform(0.75, 1.25), _MAX_DELAY))
                delay *= 2
        raise AssertionError("`num_tries` is positive")

    def _send_once(self, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self._url + path, data, headers), timeout=self._timeout) as reply:
                return json.loads(reply.read())
        except HTTPError as error:
            raise _judge(error, self._url + path) from error
        except (URLError, OSError, HTTPException) as error:
            raise _PassingError(f"no reply ({getattr(error, 'reason', None) or error!r})") from error
        except ValueError as error:
            raise _PassingError("a reply that is no JSON") from error


class _PassingError(Exception):
    def __init__(self, message: str, delay: float | None = None):
        super().__init__(message)
        self.delay = delay


class _RefusedError(ServerError):
    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def _judge(error: HTTPError, address: str) -> Exception:
    with error:
        said = error.read(2000).decode(errors="replace").strip()
    message = f"status {error.code} ({said[:300] or error.reason})"
    if error.code in _PASSING_STATUS:
        try:
            return _PassingError(message, float(error.headers.get("Retry-After", "")))
        except ValueError:
            return _PassingError(message)
    remedy = (
        f"Set the environment variable {API_KEY_VARIABLE} to the server's key."
        if error.code in (401, 403)
        else "Check the address, the model's name and the lengths."
    )
    return _RefusedError(f"`server` must accept the request, got {message} from {address}. {remedy}", error.code)


def _read_answer(reply: Any) -> Answer:
    try:
        choice = reply["choices"][0]
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content") or ""
        thoughts = message is not None and (message.get("reasoning_content") or message.get("reasoning"))
        token_ids = choice.get("token_ids")
        usage = reply.get("usage") or {}
        is_finished = choice.get("finish_reason") == "stop"
    except (LookupError, TypeError, AttributeError) as error:
        raise _PassingError("a reply without an answer") from error
    if not isinstance(text, str):
        raise _PassingError("an answer that is no text")
    if thoughts:
        raise ServerError(
            "`server` must return an answer as the target wrote it, got its thoughts apart. Start the server without "
            "a parser of thoughts (in vLLM, without `--reasoning-parser`)."
        )
    num_tokens = usage.get("completion_tokens") or len(token_ids or ())
    return Answer(text, is_finished, num_tokens, tuple(token_ids) if token_ids else None)


def _in_threads(
    ask: Callable[[int, threading.Event], Answer], count: int, num_workers: int
) -> Iterator[tuple[int, Answer]]:
    """Yield what `ask` returns for each index as it becomes ready; raise its first error after what was ready."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
    stopping = threading.Event()
    for index in range(count):
        waiting.put(index)

    def work() -> None:
        while not stopping.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                ready.put((index, ask(index, stopping)))
            except BaseException as error:
                ready.put((index, error))

    # daemons: an interrupted program does not wait for replies nobody reads
    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(num_workers, count))]
    for worker in workers:
        worker.start()
    try:
        yield from _drain(ready, count, stopping, workers)
    finally:
        stopping.set()


def _drain(
    ready: queue.SimpleQueue[tuple[int, Answer | BaseException]],
    count: int,
    stopping: threading.Event,
    workers: Sequence[threading.Thread],
) -> Iterator[tuple[int, Answer]]:
    for _ in range(count):
        index, result = ready.get()
        if not isinstance(result, BaseException):
            yield index, result
            continue
        # what the other workers are at is paid for: it is kept
        stopping.set()
        for worker in workers:
            worker.join()
        while not ready.empty():
            other, late = ready.get()
            if not isinstance(late, BaseException):
                yield other, late
        raise result
