"""A served target writes like a loaded one, and a server that fails is waited for or named."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dspark_hf.data.server import API_KEY_VARIABLE, ServerError, ServerWriter
from dspark_hf.data.writers import Answer, Sampling
from dspark_hf.prompts import Prompt, user_turn

# status, body, headers
Reply = tuple[int, Any, dict[str, str]]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)


class _Server:
    """A server on this machine that replies as `respond` says, and remembers what it was sent."""

    def __init__(self, respond: Callable[[str, Any], Reply]):
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(None)

            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _reply(self, body: Any) -> None:
                requests.append((self.path, body, dict(self.headers)))
                status, reply, headers = respond(self.path, body)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(respond: Callable[[str, Any], Reply]) -> Iterator[_Server]:
    """Serve what `respond` says for a path and a body."""
    server = _Server(respond)
    try:
        yield server
    finally:
        server.close()


def _chat(text: str, reason: str = "stop", **extra: Any) -> Reply:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason, **extra}
    return 200, {"choices": [choice], "usage": {"completion_tokens": 3}}, {}


def _echo(_: str, body: Any) -> Reply:
    return _chat(body["messages"][-1]["content"].upper())


def _in_turns(*replies: Reply) -> Callable[[str, Any], Reply]:
    left = list(replies)
    return lambda path, body: left.pop(0) if len(left) > 1 else left[0]


def _writer(server: _Server, **options: Any) -> ServerWriter:
    return ServerWriter(server.url, "target", **{"num_workers": 4, "first_delay": 0.01, "timeout": 10.0, **options})


def _write(writer: ServerWriter, *prompts: Prompt, **options: Any) -> list[Answer]:
    answers = dict(writer.write(prompts, **{"sampling": Sampling(), "max_new_tokens": 8, "seed": 5, **options}))
    return [answers[index] for index in range(len(prompts))]


def test_every_prompt_gets_its_own_answer() -> None:
    """Answers of parallel requests would be stored with other prompts."""
    with serving(_echo) as server:
        answers = _write(_writer(server), *(user_turn(f"q{index}") for index in range(20)))
    assert answers == [Answer(f"Q{index}", True, 3) for index in range(20)]


def test_a_request_says_all_there_is_to_say() -> None:
    """The server would sample otherwise than asked, or the same answer several times."""
    with serving(_echo) as server:
        _write(_writer(server), user_turn("a"), user_turn("a"), sampling=Sampling(0.7, 0.95), stop="[/INST]")
    bodies = sorted((body for _, body, _ in server.requests), key=lambda body: body["seed"])
    assert [path for path, _, _ in server.requests] == ["/v1/chat/completions"] * 2
    assert bodies[0] == {
        "model": "target",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 8,
        "temperature": 0.7,
        "top_p": 0.95,
        "stop": ["[/INST]"],
        "seed": 5,
    }
    assert bodies[1]["seed"] == 6


def test_text_is_continued() -> None:
    """A base model would be asked through a chat template it does not have."""
    reply = 200, {"choices": [{"text": " b", "finish_reason": "length"}]}, {}
    with serving(lambda *_: reply) as server:
        assert _write(_writer(server), Prompt(text="a")) == [Answer(" b", False, 0)]
    path, body, _ = server.requests[0]
    assert path == "/v1/completions" and body["prompt"] == "a"


def test_tokens_are_kept_where_the_server_tells_them() -> None:
    """The drafter would learn tokens that the target did not write."""
    with serving(lambda *_: _chat("a", token_ids=[4, 2])) as server:
        answers = _write(_writer(server, asks_for_token_ids=True), user_turn("q"))
    assert answers == [Answer("a", True, 3, (4, 2))]
    assert server.requests[0][1]["return_token_ids"] is True


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param((429, {"error": "busy"}, {"Retry-After": "0.01"}), id="busy"),
        pytest.param((503, b"", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), id="restarting"),
        pytest.param((200, b'{"choices": [', {}), id="cut_reply"),
        pytest.param((200, {"choices": []}, {}), id="no_answer"),
        pytest.param((200, [1], {}), id="another_reply"),
        pytest.param((200, {"choices": [{"text": 3}]}, {}), id="no_text"),
    ],
)
def test_passing_failures_are_tried_again(failure: Reply) -> None:
    """A long run would end at the first hiccup of the server."""
    with serving(_in_turns(failure, failure, _chat("fine"))) as server:
        assert _write(_writer(server), user_turn("q"))[0].text == "fine"
    assert len(server.requests) == 3


def test_the_server_says_when_to_come_back() -> None:
    """A busy server would be asked again and again until the run gives up."""
    with serving(_in_turns((429, b"", {"Retry-After": "0.3"}), _chat("fine"))) as server:
        start = time.perf_counter()
        _write(_writer(server), user_turn("q"))
    assert time.perf_counter() - start >= 0.3


def test_a_slow_reply_is_tried_again() -> None:
    """A request that hangs would hang the run."""
    numbers = iter(range(10))

    def respond(*_: Any) -> Reply:
        if next(numbers) == 0:
            time.sleep(0.6)
        return _chat("fine")

    with serving(respond) as server:
        assert _write(_writer(server, timeout=0.2), user_turn("q"))[0].text == "fine"


def test_failures_that_stay_end_the_run() -> None:
    """A run against a dead server would never end."""
    with serving(lambda *_: (500, b"out of memory", {})) as server:
        with pytest.raises(ServerError, match=r"must answer, got status 500 \(out of memory\) from .*, 3 times"):
            _write(_writer(server, num_tries=3), user_turn("q"))
        url = server.url
    with pytest.raises(ServerError, match="got no reply .*Check that it is running"):
        ServerWriter(url, "target", num_tries=2, first_delay=0.01).check()


def test_ready_answers_are_kept_when_another_fails() -> None:
    """A request that fails for good costs all the answers beside it."""

    def respond(path: str, body: Any) -> Reply:
        text = body["messages"][0]["content"]
        time.sleep(0.2 if text == "slow" else 0)
        return (404, b"unknown", {}) if text == "bad" else _chat(text)

    texts = []
    with serving(respond) as server, pytest.raises(ServerError, match=r"got status 404 \(unknown\)"):
        for _, answer in _writer(server).write(
            [user_turn("slow"), user_turn("good"), user_turn("bad")], Sampling(), max_new_tokens=4, seed=0
        ):
            texts.append(answer.text)
    assert sorted(texts) == ["good", "slow"]
    assert len(server.requests) == 3


def test_thoughts_are_not_lost_in_silence() -> None:
    """The drafter would learn answers without the thoughts that the target writes first."""
    reply = 200, {"choices": [{"message": {"content": "a", "reasoning_content": "hm"}, "finish_reason": "stop"}]}, {}
    with serving(lambda *_: reply) as server, pytest.raises(ServerError, match="got its thoughts apart"):
        _write(_writer(server), user_turn("q"))


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with a key could not be used, or its key would stand in a command line."""
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    with serving(_echo) as server:
        _write(_writer(server), user_turn("q"))
    assert server.requests[0][2]["Authorization"] == "Bearer secret"
    with serving(lambda *_: (401, b"no", {})) as server:
        with pytest.raises(ServerError, match=f"{API_KEY_VARIABLE} to the server's key") as failure:
            _write(_writer(server), user_turn("q"))
        assert "secret" not in str(failure.value)


def test_the_model_must_be_served() -> None:
    """A wrong name would be told by the first of many requests only."""
    with serving(lambda *_: (200, {"data": [{"id": "other"}]}, {})) as server:
        with pytest.raises(ServerError, match=r"`model` must be served .* got 'target', where there are \['other'\]"):
            _writer(server).check()
        ServerWriter(server.url + "/v1/", "other").check()
    assert [path for path, _, _ in server.requests] == ["/v1/models"] * 2
    with serving(lambda *_: (404, b"", {})) as server:
        _writer(server).check()


def test_a_reader_that_stops_stops_the_requests() -> None:
    """An interrupted run would go on asking the server."""
    with serving(_echo) as server:
        answers = _writer(server, num_workers=1).write(
            [user_turn(str(index)) for index in range(500)], Sampling(), max_new_tokens=4, seed=0
        )
        next(answers)
        # declared an iterator, but written as a generator
        answers.close()  # type: ignore[attr-defined]
        time.sleep(0.1)
        num_requests = len(server.requests)
        time.sleep(0.1)
    assert len(server.requests) == num_requests < 500


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
def test_a_wrong_address_is_named(url: str) -> None:
    """A typing error would look like a server that is down."""
    with pytest.raises(ValueError, match="must be an http address"):
        ServerWriter(url, "target")


def _refusing(text: str) -> Callable[[str, Any], Reply]:
    said = b"maximum \x1b]0;context\x07 length", {}
    return lambda _, body: (400, *said) if text in body["messages"][0]["content"] else _chat("fine")


def test_a_refused_prompt_costs_one_prompt() -> None:
    """One prompt that is too long for the server ends a collection, in every run anew."""
    with serving(_refusing("bad")) as server:
        writer = _writer(server)
        prompts = [user_turn("bad" if index == 3 else "good") for index in range(30)]
        answers = dict(writer.write(prompts, Sampling(), max_new_tokens=4, seed=0))
    assert sorted(answers) == [index for index in range(30) if index != 3]
    assert writer.num_refused == 1
    assert writer.last_refusal == "'bad': status 400 (maximum \ufffd]0;context\ufffd length)"


def test_many_refused_prompts_end_the_run() -> None:
    """A wrong setting is sent with thousands of prompts, and nobody hears of it."""
    with serving(_refusing("")) as server:
        with pytest.raises(ServerError, match=r"must accept the prompts, got 20 refused and 0 answered"):
            _write(_writer(server, num_workers=1), *[user_turn("good")] * 100)
        assert len(server.requests) < 30


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", ["check", "write"])
def test_the_key_is_sent_to_no_other_address(status: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever a server points to gets the key, and may answer in its place."""
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    with serving(_echo) as other:
        reply = status, b"", {"Location": other.url + "/v1/models"}
        with serving(lambda *_: reply) as server:
            writer = _writer(server)
            with pytest.raises(ServerError, match=f"must answer itself, got a redirect .* to '{other.url}"):
                writer.check() if path == "check" else _write(writer, user_turn("q"))
    assert len(server.requests) == 1 and other.requests == []


@pytest.mark.parametrize("url", ["http://user:hunter2@host", "http://hunter2@host:8000/v1"])
def test_a_password_in_the_address_is_refused_and_not_shown(url: str) -> None:
    """A password that is not used stands in the logs."""
    with pytest.raises(ValueError, match="must hold no user and no password") as failure:
        ServerWriter(url, "target")
    assert "hunter2" not in str(failure.value)


@pytest.mark.parametrize(
    "token_ids", [["a"], [10**12], [-5], [1.5], "abc", {"a": 1}, [[1]], 5, [True], [64]], ids=lambda value: str(value)
)
def test_nonsense_in_the_place_of_tokens_is_refused(token_ids: Any) -> None:
    """It is written to the file, and training breaks on it later."""
    with serving(lambda *_: _chat("a", token_ids=token_ids)) as server:
        writer = _writer(server, asks_for_token_ids=True, num_tries=2, vocab_size=64)
        with pytest.raises(ServerError, match="got `token_ids` that are no token ids of the target"):
            _write(writer, user_turn("q"))


@pytest.mark.parametrize("usage", [{"completion_tokens": "many"}, [1], 3, {"completion_tokens": -4}, None])
def test_odd_counts_cost_nothing(usage: Any) -> None:
    """The progress bar ends a run."""
    reply = 200, {"choices": [{"text": "b", "finish_reason": ["stop"]}], "usage": usage}, {}
    with serving(lambda *_: reply) as server:
        assert _write(_writer(server), Prompt(text="a")) == [Answer("b", False, 0)]


@pytest.mark.parametrize("listed", [[1], None, 3, "models", {"data": 3}, {}])
def test_another_protocol_is_named(listed: Any) -> None:
    """A stack of calls is shown in the place of what is wrong."""
    with serving(lambda *_: (200, listed, {})) as server, pytest.raises(ServerError, match="must speak OpenAI's"):
        _writer(server).check()


def test_deep_replies_are_none() -> None:
    """A reply of brackets ends a run with a stack of calls."""
    with serving(_in_turns((200, b"[" * 200_000, {}), _chat("fine"))) as server:
        assert _write(_writer(server), user_turn("q"))[0].text == "fine"


def test_a_reply_is_bounded_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply without an end fills the memory."""
    monkeypatch.setattr("dspark_hf.data.server._MAX_BYTES", 1 << 16)
    with serving(lambda *_: (200, b" " * (1 << 20), {})) as server:
        with pytest.raises(ServerError, match=r"got more than 69,632 bytes"):
            _write(_writer(server), user_turn("q"))
        assert len(server.requests) == 1


@pytest.mark.parametrize("dribbled", ["header", "body"])
def test_a_reply_is_bounded_in_time(dribbled: str) -> None:
    """A server that sends a byte now and then holds a run for ever."""
    is_over = threading.Event()

    def dribble(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        start = b"HTTP/1.1 200 OK\r\n" + (b"X: " if dribbled == "header" else b"Content-Length: 100000\r\n\r\n")
        try:
            connection.sendall(start)
            while not is_over.wait(0.02):
                connection.sendall(b" ")
        except OSError:
            is_over.set()

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            connection, _ = listening.accept()
            with connection:
                dribble(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        writer = ServerWriter(f"http://127.0.0.1:{listening.getsockname()[1]}", "target", timeout=0.3, num_tries=1)
        with pytest.raises(ServerError, match="got no reply"):
            _write(writer, user_turn("q"))
        # the connection was cut: without that the server would go on for ever
        thread.join(5)
        assert not thread.is_alive()


def test_who_runs_an_event_loop_may_ask() -> None:
    """A notebook, which runs in an event loop, cannot let a server write."""

    async def ask(server: _Server) -> list[Answer]:
        writer = _writer(server)
        writer.check()
        return _write(writer, user_turn("a"), user_turn("b"))

    def respond(path: str, body: Any) -> Reply:
        return (200, {"data": [{"id": "target"}]}, {}) if path == "/v1/models" else _echo(path, body)

    with serving(respond) as server:
        assert [answer.text for answer in asyncio.run(ask(server))] == ["A", "B"]


def test_a_packed_reply_is_not_unpacked() -> None:
    """A small reply that unpacks to gigabytes fills the memory."""
    packed = gzip.compress(json.dumps(_chat("a")[1]).encode())
    with serving(lambda *_: (200, packed, {"Content-Encoding": "gzip"})) as server:
        with pytest.raises(ServerError, match="a reply that is no JSON"):
            _write(_writer(server, num_tries=2), user_turn("q"))
        assert server.requests[0][2]["Accept-Encoding"] == "identity"
