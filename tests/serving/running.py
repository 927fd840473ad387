"""A real server on this machine, over a tiny target whose passes a test can hold back."""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from openai import OpenAI

from dspark_hf.generation.drafting.interface import Drafter
from dspark_hf.generation.lookup_assistant import LookupAssistant
from dspark_hf.serving.app import create_app
from dspark_hf.serving.engine import Engine
from dspark_hf.serving.model import ServedModel
from tests.tiny import tiny_target
from tests.training.tiny_tokenizer import tiny_tokenizer

NAME = "tiny"
# of "<eos>" and "<end>" in the tiny tokenizer
EOS, END = 2, 5
SECONDS = 30.0


class Brake:
    """Hold a target's passes back, or let them fail, so that a test decides what happens during one.

    Attributes:
        num_passes: passes that were begun.
        failing: numbers of the passes that fail, from 1.
    """

    def __init__(self, target: Any):
        self._changed = threading.Condition()
        self._last: float = math.inf
        self.num_passes = 0
        self.failing: set[int] = set()
        self._hook = target.register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        with self._changed:
            self.num_passes += 1
            number = self.num_passes
            assert self._changed.wait_for(lambda: number <= self._last, SECONDS)
        if number in self.failing:
            raise RuntimeError("the machine fell over")

    @contextmanager
    def held(self, after: int = 0) -> Iterator[None]:
        """Let none but the next `after` passes begin inside."""
        self._last = self.num_passes + after
        try:
            yield
        finally:
            with self._changed:
                self._last = math.inf
                self._changed.notify_all()


class Running:
    """A server that answers.

    Args:
        url: where it is.
        model: what it serves.
        engine: what decodes.
    """

    def __init__(self, url: str, model: ServedModel, engine: Engine, api_key: str = "none"):
        self.url, self.model, self.engine = url, model, engine
        self.client = OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=SECONDS)
        self.brake = Brake(model.target)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
        """Return status, headers and body of the answer to what no client of OpenAI's would send.

        A `body` of bytes is sent as it is, another as JSON; without one the method is GET.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return response.status, response.headers, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read().decode()

    def metric(self, name: str) -> float:
        """Return a number that Prometheus would read; 0 if it is not there."""
        pairs = [line.rpartition(" ") for line in self.ask("/metrics")[2].splitlines()]
        return sum(float(value) for found, _, value in pairs if found == name)

    def ids(self, content: str) -> torch.Tensor:
        """Return the prompt `(1, T)` of a chat with one user turn."""
        messages = [{"role": "user", "content": content}]
        text = self.model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    def plain(self, ids: torch.Tensor, count: int, **options: Any) -> list[int]:
        """Return the tokens that the target itself adds."""
        options = {"do_sample": False, "eos_token_id": [EOS, END], **options}
        output = self.model.target.generate(ids, max_new_tokens=count, **options)
        return output[0, ids.shape[1] :].tolist()

    def text(self, token_ids: list[int]) -> str:
        """Return what tokens say."""
        return str(self.model.tokenizer.decode(token_ids, skip_special_tokens=True))


@contextmanager
def serve(
    *, target: Any = None, drafter: Drafter | None = None, engine_options: dict[str, Any] | None = None, **app: Any
) -> Iterator[Running]:
    """Run a server inside; whatever a test leaves open ends with it."""
    target = tiny_target() if target is None else target
    target.generation_config.eos_token_id = EOS
    model = ServedModel(NAME, target, tiny_tokenizer())
    engine = Engine(target, LookupAssistant() if drafter is None else drafter, **(engine_options or {}))
    config = uvicorn.Config(
        create_app(model, engine, **app), port=0, log_level="error", timeout_graceful_shutdown=1, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", model, engine, app.get("api_key") or "none")
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def wait_until(condition: Any) -> None:
    """Wait until something is true, as it is soon."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)
