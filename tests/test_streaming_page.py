"""The code of `docs/streaming.md` does what the page says."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.generation.requests.request import Request
from tests.generation.call.test_criteria import character_tokenizer
from tests.tiny import tiny_target

PAGE = Path(__file__).parent.parent / "docs" / "streaming.md"
PROMPT = [5, 6, 7]


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def names() -> dict[str, Any]:
    """What the page takes for granted."""
    target = tiny_target()
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8, block_size=5)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return {"target": target, "drafter": drafter, "tokenizer": tokenizer}


@pytest.fixture
def server(names) -> Iterator[dict[str, Any]]:
    """The server's names, its thread running."""
    definitions, marker, _ = _blocks()[1].partition("finished = ask(")
    assert marker
    exec(definitions, names)
    yield names
    names["waiting"].close()
    names["decoding"].join(60)
    assert not names["decoding"].is_alive()


def _alone(names: dict[str, Any], count: int) -> list[int]:
    ids = torch.tensor([PROMPT])
    return names["target"].generate(ids, max_new_tokens=count, do_sample=False)[0].tolist()


def test_code_runs_as_it_is(names, capsys):
    """A reader pastes the page's code, and it fails."""
    for block in _blocks():
        exec(block, names)
    printed = capsys.readouterr().out
    assert "planet" in printed and "sky" in printed
    assert not names["decoding"].is_alive()
    assert len(names["finished"].token_ids) == 23


def test_requests_that_fail_have_no_text(names, capsys):
    """The first example ends at the first request that comes without a text."""
    names["tokenizer"].chat_template = ""
    exec(_blocks()[0], names)
    assert "sky None" in capsys.readouterr().out


@pytest.mark.parametrize("is_running", [True, False])
def test_a_client_that_cancels(server, is_running):
    """A client that gives up ends the thread that decodes, or keeps its row; others wait for ever."""
    has_begun = threading.Event()

    class Streamer:
        def put(self, value: Any) -> None:
            has_begun.set()

        def end(self) -> None:
            """Nothing."""

    given_up = server["ask"](PROMPT, max_new_tokens=240, do_sample=False, streamer=Streamer())
    if is_running:
        assert has_begun.wait(60)
    assert given_up.cancel()
    other = server["ask"](PROMPT, max_new_tokens=15, do_sample=False)
    assert other.result(60).token_ids.tolist() == _alone(server, 15)
    with pytest.raises(CancelledError):
        given_up.result(60)
    assert server["decoding"].is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_target_that_fails(server, monkeypatch):
    """Clients wait for ever when the target has failed, or the queue takes requests that nobody reads."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of order")

    class Breaking:
        num_puts = 0

        def put(self, value: Any) -> None:
            self.num_puts += 1
            # the prompt comes first, then a token, and then a round
            if self.num_puts == 2:
                monkeypatch.setattr(server["target"].model, "forward", fail)

        def end(self) -> None:
            """Nothing."""

    future = server["ask"](PROMPT, max_new_tokens=200, streamer=Breaking())
    assert "out of order" in str(future.result(60).error)
    server["decoding"].join(60)
    with pytest.raises(ValueError, match="`put` must come before `close`"):
        server["waiting"].put(Request(PROMPT))
