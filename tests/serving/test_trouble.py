"""What goes wrong around a server: clients that leave, queues that are full, rounds that fail."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from dspark_hf.serving.answer import Answer
from dspark_hf.serving.engine import Engine
from tests.serving.running import NAME, Brake, Running, serve, wait_until
from tests.tiny import tiny_target
from tests.training.tiny_tokenizer import tiny_tokenizer

COUNT = 8


def _text(running: Running, content: str, **options: Any) -> str:
    answer = running.client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": content}],
        **{"temperature": 0, "max_tokens": COUNT, **options},
    )
    return str(answer.choices[0].message.content)


def _stream(running: Running, content: str, count: int) -> Any:
    messages: Any = [{"role": "user", "content": content}]
    return running.client.chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=count, stream=True
    )


def _expected(running: Running, content: str) -> str:
    return running.text(running.plain(running.ids(content), COUNT))


def _ends(running: Running, end: str) -> float:
    return running.metric(f'dspark_requests_total{{end="{end}"}}')


def _connect(running: Running, **fields: Any) -> socket.socket:
    """Return a connection over which a chat was asked for."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "w10"}], "max_tokens": COUNT, **fields}
    data = json.dumps(body).encode()
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_a_client_that_leaves_is_not_written_for():
    """A client closes its stream, and the target goes on writing for nobody."""
    with serve() as running:
        with running.brake.held(after=3):
            stream = _stream(running, "w10 w11", count=200)
            assert any(chunk.choices[0].delta.content for chunk in stream)
            stream.close()
            wait_until(lambda: _ends(running, "cancelled") == 1)
        wait_until(lambda: running.engine.num_running == 0)
        # at most the pass that was held
        assert running.brake.num_passes <= 4
        with running.brake.held():
            connection = _connect(running)
            wait_until(lambda: running.engine.num_running == 1)
            connection.close()
            wait_until(lambda: _ends(running, "cancelled") == 2)
        wait_until(lambda: running.engine.num_running == 0)
        assert _text(running, "w12") == _expected(running, "w12")


def test_a_full_queue_says_when_to_come_back():
    """Requests pile up without end, or one that left keeps its place."""
    with serve(engine_options={"max_rows": 1, "max_waiting": 1}) as running, ThreadPoolExecutor(2) as clients:
        with running.brake.held():
            first = clients.submit(_text, running, "w10")
            wait_until(lambda: running.engine.num_running == 1)
            waiting = _connect(running)
            wait_until(lambda: running.engine.num_waiting == 1)
            with pytest.raises(openai.RateLimitError, match="must have room for a request") as refused:
                _text(running, "w12")
            assert int(refused.value.response.headers["Retry-After"]) >= 1
            waiting.close()
            wait_until(lambda: running.engine.num_waiting == 0)
            last = clients.submit(_text, running, "w13")
            wait_until(lambda: running.engine.num_waiting == 1)
        assert first.result() == _expected(running, "w10")
        assert last.result() == _expected(running, "w13")
        assert (_ends(running, "queue_full"), _ends(running, "cancelled")) == (1, 1)


def test_a_request_has_its_time():
    """A request waits for ever, or a stream that took too long ends as if it were whole."""
    with serve(seconds=0.3) as running:
        with running.brake.held(), pytest.raises(openai.InternalServerError, match="within 0.3 seconds") as over:
            _text(running, "w10")
        assert over.value.status_code == 504
        with running.brake.held(after=2), pytest.raises(openai.APIError, match="within 0.3 seconds"):
            list(_stream(running, "w10", count=200))
        assert _ends(running, "timeout") == 2
        wait_until(lambda: running.engine.num_running == 0)


def _ask_held(running: Running, clients: ThreadPoolExecutor, contents: list[str]) -> list[Future[str]]:
    """Return requests of which the first is held in its first pass, and the others wait."""
    jobs = []
    for number, content in enumerate(contents):
        jobs.append(clients.submit(_text, running, content))
        wait_until(lambda number=number: running.engine.num_running == 1 and running.engine.num_waiting == number)
    return jobs


def test_a_request_that_fails_costs_itself():
    """One prompt that the target cannot read takes its neighbours along."""
    contents = ["w10", "w11", "w12"]
    with serve(engine_options={"max_rows": 3}) as running, ThreadPoolExecutor(3) as clients:
        with running.brake.held():
            jobs = _ask_held(running, clients, contents)
            running.brake.failing = {running.brake.num_passes + 1}
        with pytest.raises(openai.InternalServerError, match="got RuntimeError"):
            jobs[1].result()
        for job, content in ((jobs[0], "w10"), (jobs[2], "w12")):
            assert job.result() == _expected(running, content)


def test_a_round_that_fails_spares_those_that_wait():
    """One round that fails loses requests that had not begun, or leaves clients without an answer."""
    with serve(engine_options={"max_rows": 2}) as running, ThreadPoolExecutor(3) as clients:
        with running.brake.held():
            jobs = _ask_held(running, clients, ["w10", "w11", "w12"])
            # behind the two prompts
            running.brake.failing = {running.brake.num_passes + 2}
        for job in jobs[:2]:
            with pytest.raises(openai.InternalServerError, match="got RuntimeError"):
                job.result()
        assert jobs[2].result() == _expected(running, "w12")
        assert running.ask("/health")[0] == 200


def test_a_target_that_always_fails_is_told_to_those_who_watch():
    """A server that answers nobody looks healthy, so that nothing restarts it."""
    with serve() as running:
        for _ in range(3):
            running.brake.failing = {running.brake.num_passes + 2}
            with pytest.raises(openai.InternalServerError):
                _text(running, "w10")
        wait_until(lambda: running.ask("/health")[0] == 503)
        with pytest.raises(openai.InternalServerError, match="fails again and again") as refused:
            _text(running, "w10")
        assert refused.value.status_code == 503


def test_a_stream_tells_that_it_failed():
    """A stream that breaks off looks whole."""
    with serve() as running:
        with running.brake.held(after=2):
            stream = _stream(running, "w10", count=100)
            next(stream)
            running.brake.failing = {running.brake.num_passes + 1, running.brake.num_passes}
        with pytest.raises(openai.APIError, match="got RuntimeError"):
            list(stream)


def test_closing_answers_everybody():
    """A server is shut down, and requests wait for ever."""
    target = tiny_target()
    engine = Engine(target, max_rows=1)
    brake = Brake(target)

    async def ask_and_close() -> list[Answer]:
        answers = [Answer(tiny_tokenizer(), 2) for _ in range(3)]
        engine.start()
        with brake.held():
            for answer in answers:
                engine.submit(answer, [10, 11], {"max_new_tokens": 200})
            await asyncio.to_thread(wait_until, lambda: brake.num_passes == 1)
            closing = threading.Thread(target=engine.close)
            closing.start()
            await asyncio.to_thread(wait_until, lambda: all(request.is_cancelled for request in list(engine._open)))
        for answer in answers:
            while await asyncio.wait_for(answer.next(), 30) is not None:
                pass
        await asyncio.to_thread(closing.join)
        return answers

    answers = asyncio.run(ask_and_close())
    assert [answer.ending is not None and answer.ending.reason for answer in answers] == [None] * 3
    assert all("shut down" in str(answer.ending.error) for answer in answers[1:])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_beams", 2, "`num_beams` must be 1"),
        ("stop_strings", ["w10"], "stop string"),
        ("typical_p", 0.5, "`generation_config` of the target must leave out `typical_p` to be served, got 0.5."),
    ],
)
def test_a_target_that_cannot_be_served_is_refused_at_once(field, value, message):
    """A server starts, and refuses every request for what its target's configuration says."""
    target = tiny_target()
    setattr(target.generation_config, field, value)
    with pytest.raises(ValueError, match=message), serve(target=target):
        pass


def _resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _misbehave(running: Running, kind: int) -> None:
    if kind == 0:
        stream = _stream(running, "w10 w11", count=100)
        next(stream)
        stream.close()
        return
    if kind == 1:
        _connect(running, max_tokens=100).close()
        return
    if kind == 2:
        running.ask("/v1/chat/completions", {"model": NAME, "bad": "x" * 1000})
        return
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        if kind == 3:
            connection.sendall(random.Random(0).randbytes(400) + b"\r\n\r\n")
            connection.recv(100)
        else:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the process's memory")
def test_bad_clients_for_a_long_time():
    """After some thousand bad clients the memory is full, a row is lost, or good ones get other texts.

    `DSPARK_SOAK_MINUTES` says for how long; default half a minute.
    """
    seconds = 60 * float(os.environ.get("DSPARK_SOAK_MINUTES", "0.5"))
    with serve(engine_options={"max_waiting": 32}) as running, ThreadPoolExecutor(6) as clients:
        contents = [f"w{10 + i}" for i in range(8)]
        expected = {content: _expected(running, content) for content in contents}
        start, count, early = time.monotonic(), 0, 0.0
        while time.monotonic() < start + seconds:
            bad = [clients.submit(_misbehave, running, (count + kind) % 5) for kind in range(5)]
            content = contents[count % 8]
            assert _text(running, content) == expected[content]
            for job in bad:
                job.result()
            count += 1
            if time.monotonic() < start + seconds / 3:
                early = _resident_megabytes()
        wait_until(lambda: running.engine.num_running == running.engine.num_waiting == 0)
        late = _resident_megabytes()
        assert count > 10 and late < 1.05 * early + 8, f"{early:.0f} MiB, then {late:.0f} MiB in {count} turns"
