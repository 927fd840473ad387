"""Let a server of the target write: any that speaks OpenAI's protocol, such as vLLM, SGLang or llama.cpp."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anyio
from anyio.from_thread import start_blocking_portal

from dspark_hf.console import printable
from dspark_hf.data.http import NoReplyError, Reply, TooLongError, open_client, send
from dspark_hf.data.writers import Answer, Sampling
from dspark_hf.prompts import Prompt, plain_text

API_KEY_VARIABLE = "DSPARK_HF_API_KEY"

# the server is busy, restarting, or behind a proxy that says so
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_MAX_DELAY = 60.0
# the prompt is too long for this server, or holds what it does not take; others may be fine
_REFUSED_PROMPT_STATUS = {400, 413, 422}
# refused prompts after which, if they are more than the answered ones, the fault is taken to lie elsewhere
_MANY_REFUSED = 20
# A reply's bytes at most: for what stands around an answer, and for each token of it. A token has four characters,
# the longest ones some dozens, each six bytes as JSON's escape, and its number.
_MAX_BYTES = 4 << 20
_MAX_BYTES_PER_TOKEN = 512
# more than any vocabulary has
_MAX_TOKEN_ID = 1 << 31


class ServerError(RuntimeError):
    """The server cannot be used, or does not answer as it should; the message says what to do."""


class ServerWriter:
    """A served target that writes.

    Requests that fail for a passing reason are sent again, after 1, 2, 4 ... seconds or when the server says. A prompt
    that the server refuses is left out. The key, if the server wants one, is read from the environment variable
    `DSPARK_HF_API_KEY`; it is written nowhere, and sent to no other address: redirects are refused. A reply's size and
    time are bounded, and what it says is checked.

    A server knows the text it wrote; its tokens it tells only if it knows the field `return_token_ids`, as vLLM does.

    Args:
        url: the server's address, with or without `/v1`.
        model: the name it serves the target under.
        num_workers: requests at once.
        timeout: seconds until an answer must be there, all of it.
        num_tries: how often a request is sent before the run gives up.
        first_delay: seconds before the second try.
        asks_for_token_ids: whether to send `return_token_ids`; other servers may refuse a field they do not know.
        vocab_size: the target's, if it is known; no token id can be larger.

    Attributes:
        num_refused: prompts that were left out.
        last_refusal: the last of them and what the server said of it, in words; "" if there is none.

    Raises:
        ValueError: if `url` is no address, or holds a password.

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
        vocab_size: int | None = None,
    ):
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        if "@" in url.partition("://")[2].partition("/")[0]:
            # not shown: it would stand in logs
            raise ValueError(
                "`server` must hold no user and no password, got an address with an @. Leave them out, and set the "
                f"environment variable {API_KEY_VARIABLE} to the server's key."
            )
        if parts.scheme not in ("http", "https") or not parts.netloc or not url.isprintable():
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
        self._max_token_id = _MAX_TOKEN_ID if vocab_size is None else vocab_size - 1
        self._num_answered = 0
        self.num_refused = 0
        self.last_refusal = ""

    def check(self) -> None:
        """Ask the server for its models.

        Raises:
            ServerError: if it cannot be reached, or does not serve the target.
        """
        try:
            with start_blocking_portal() as portal:
                listed = portal.call(self._list_models)
        except _RefusedError as error:
            if error.status in (404, 405):
                # not every server lists its models
                return
            raise
        data = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(data, list):
            raise ServerError(
                f"`server` must speak OpenAI's protocol, got {printable(repr(listed)[:80])} from {self._url}/models. "
                "Check the address."
            )
        models = [str(model.get("id"))[:200] for model in data if isinstance(model, dict)]
        if models and self._model not in models:
            raise ServerError(
                f"`model` must be served by {self._url}, got {self._model!r}, where there are {models[:8]}. Name "
                "one of them."
            )

    async def _list_models(self) -> Any:
        async with open_client(1) as client:
            return await self._send(_Connection(client, anyio.Event()), "/models", None)

    def write(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, max_new_tokens: int, seed: int, stop: str = ""
    ) -> Iterator[tuple[int, Answer]]:
        """Yield each prompt's index and its answer, as `Writer.write` says; prompts that are refused have none.

        Raises:
            ServerError: if a request fails for good, or most prompts are refused; the answers that were ready have
                been yielded.
        """
        options = {
            "model": self._model,
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **({"stop": [stop]} if stop else {}),
            **({"return_token_ids": True} if self._asks_for_token_ids else {}),
        }

        async def ask(connection: _Connection, index: int) -> Answer | None:
            # another seed for each: the same prompt may be among them several times
            own = {**options, "seed": (seed + index) % (1 << 31)}
            return await self._ask_or_leave_out(connection, prompts[index], own)

        yield from _in_parallel(ask, len(prompts), self._num_workers)

    async def _ask_or_leave_out(
        self, connection: _Connection, prompt: Prompt, options: Mapping[str, Any]
    ) -> Answer | None:
        """Return the answer, or None if the server refuses this prompt."""
        try:
            answer = await self._ask(connection, prompt, options)
        except _RefusedError as error:
            if error.status not in _REFUSED_PROMPT_STATUS:
                raise
            self.num_refused += 1
            self.last_refusal = f"{printable(plain_text(prompt)[:60])!r}: {error.said}"
            if self.num_refused >= _MANY_REFUSED and self.num_refused > self._num_answered:
                raise ServerError(
                    f"`server` must accept the prompts, got {self.num_refused} refused and {self._num_answered} "
                    f"answered, the last one {self.last_refusal}. Check the model's name, `--max-new-tokens` and "
                    "the prompts' lengths."
                ) from error
            return None
        self._num_answered += 1
        return answer

    async def _ask(self, connection: _Connection, prompt: Prompt, options: Mapping[str, Any]) -> Answer:
        if prompt.messages is None:
            return await self._send(connection, "/completions", {**options, "prompt": prompt.text}, self._read_answer)
        body = {**options, "messages": list(prompt.messages)}
        return await self._send(connection, "/chat/completions", body, self._read_answer)

    def _read_answer(self, reply: Any) -> Answer:
        return _read_answer(reply, self._max_token_id)

    async def _send(
        self,
        connection: _Connection,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[Any], Any] = lambda reply: reply,
    ) -> Any:
        """Send a request until the server replies with something that `read` understands; return what it read."""
        delay = self._first_delay
        for number in range(1, self._num_tries + 1):
            try:
                return read(await self._send_once(connection, path, body))
            except _PassingError as error:
                if number == self._num_tries or connection.is_ending.is_set():
                    raise ServerError(
                        f"`server` must answer, got {error} from {self._url}{path}, {number} times. Check that it is "
                        "running, then run the same command again: it goes on where it was."
                    ) from error
                # not all requests at the same moment
                with anyio.move_on_after(min(error.delay or delay * random.uniform(0.75, 1.25), _MAX_DELAY)):
                    await connection.is_ending.wait()
                delay *= 2
        raise AssertionError("`num_tries` is positive")

    async def _send_once(self, connection: _Connection, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        max_bytes = _MAX_BYTES + _MAX_BYTES_PER_TOKEN * (body or {}).get("max_tokens", 0)
        address = self._url + path
        try:
            reply = await send(connection.client, address, data, headers, seconds=self._timeout, max_bytes=max_bytes)
        except TooLongError as error:
            raise ServerError(
                f"`server` must reply with the answer alone, got more than {max_bytes:,} bytes from {address}. Check "
                "the address."
            ) from error
        except NoReplyError as error:
            raise _PassingError(f"no reply ({printable(str(error))})") from error
        if not 200 <= reply.status < 300:
            raise _judge(reply, address)
        try:
            return json.loads(reply.body)
        except (ValueError, RecursionError) as error:
            raise _PassingError("a reply that is no JSON") from error


@dataclass(frozen=True)
class _Connection:
    """What sends, and whether no further requests are to be made."""

    client: Any
    is_ending: anyio.Event


class _PassingError(Exception):
    def __init__(self, message: str, delay: float | None = None):
        super().__init__(message)
        self.delay = delay


class _RefusedError(ServerError):
    def __init__(self, message: str, status: int, said: str):
        super().__init__(message)
        self.status = status
        self.said = said


def _judge(reply: Reply, address: str) -> Exception:
    said = reply.body.decode(errors="replace").strip()
    message = f"status {reply.status} ({printable(said[:300] or reply.reason)})"
    if 300 <= reply.status < 400:
        return ServerError(
            f"`server` must answer itself, got a redirect from {address} to "
            f"{printable(str(reply.headers.get('Location'))[:200])!r}. Nothing was sent there: name that address if "
            "it is the server's."
        )
    if reply.status in _PASSING_STATUS:
        try:
            return _PassingError(message, float(reply.headers.get("Retry-After", "")))
        except ValueError:
            return _PassingError(message)
    remedy = (
        f"Set the environment variable {API_KEY_VARIABLE} to the server's key."
        if reply.status in (401, 403)
        else "Check the address, the model's name and the lengths."
    )
    whole = f"`server` must accept the request, got {message} from {address}. {remedy}"
    return _RefusedError(whole, reply.status, message)


def _read_answer(reply: Any, max_token_id: int) -> Answer:
    try:
        choice = reply["choices"][0]
        message = choice.get("message")
        text = choice["text"] if message is None else message.get("content") or ""
        thoughts = message is not None and (message.get("reasoning_content") or message.get("reasoning"))
        token_ids = choice.get("token_ids")
        usage = reply.get("usage")
        is_finished = choice.get("finish_reason") == "stop"
    except (LookupError, TypeError, AttributeError) as error:
        raise _PassingError("a reply without an answer") from error
    if not isinstance(text, str):
        raise _PassingError("an answer that is no text")
    if token_ids is not None and not _are_token_ids(token_ids, max_token_id):
        raise _PassingError(f"`token_ids` that are no token ids of the target ({printable(repr(token_ids)[:60])})")
    if thoughts:
        raise ServerError(
            "`server` must return an answer as the target wrote it, got its thoughts apart. Start the server without "
            "a parser of thoughts (in vLLM, without `--reasoning-parser`)."
        )
    # it only moves a bar: what it may be is not worth an answer
    said = usage.get("completion_tokens") if isinstance(usage, dict) else None
    num_tokens = said if type(said) is int and 0 < said <= _MAX_TOKEN_ID else len(token_ids or ())
    return Answer(text, is_finished, num_tokens, tuple(token_ids) if token_ids else None)


def _are_token_ids(value: Any, most: int) -> bool:
    # a truth value is no number
    return isinstance(value, list) and all(type(one) is int and 0 <= one <= most for one in value)


def _in_parallel(
    ask: Callable[[_Connection, int], Awaitable[Answer | None]], count: int, num_workers: int
) -> Iterator[tuple[int, Answer]]:
    """Yield each index with its answer as it becomes ready; raise the first error after what was ready."""
    # requests have an event loop in a thread of its own: the caller may run in one, as notebooks do
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(open_client(num_workers)) as client:
        connection = _Connection(client, portal.call(anyio.Event))
        limiter = portal.call(anyio.CapacityLimiter, num_workers)

        async def ask_in_turn(index: int) -> Answer | None:
            async with limiter:
                try:
                    return None if connection.is_ending.is_set() else await ask(connection, index)
                except Exception:
                    # what others are at is paid for: it is waited for, and kept
                    connection.is_ending.set()
                    raise

        indices = {portal.start_task_soon(ask_in_turn, index): index for index in range(count)}
        failures = []
        try:
            for future in as_completed(indices):
                if (failure := future.exception()) is not None:
                    failures.append(failure)
                elif (answer := future.result()) is not None:
                    yield indices[future], answer
        finally:
            portal.call(connection.is_ending.set)
        if failures:
            raise failures[0]
