"""`dspark-hf serve` from its arguments to an address that answers."""

from __future__ import annotations

import threading
from importlib import util
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dspark_hf.cli.main import app
from dspark_hf.demo.tiny import write_tiny_pair

for package in ("fastapi", "uvicorn", "openai", "prometheus_client"):
    pytest.importorskip(package)


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["serve", *arguments], env={"COLUMNS": "500", "NO_COLOR": "1"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_a_folder_is_served(tmp_path, monkeypatch):
    """The command does not hand on what it was told, or serves another text."""
    import uvicorn
    from openai import OpenAI

    from tests.serving.running import SECONDS, wait_until

    servers: list[Any] = []

    class Remembered(uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(uvicorn, "Server", Remembered)
    target, drafter = map(str, write_tiny_pair(tmp_path))
    outcome: list[tuple[int, str]] = []
    arguments = (target, "--drafter", drafter, "--port", "0", "--name", "mine", "--api-key", "key", "--context", "64")
    thread = threading.Thread(target=lambda: outcome.append(_run(*arguments)))
    thread.start()
    try:
        wait_until(lambda: (servers and servers[0].started) or outcome)
        assert not outcome, outcome
        host, port = servers[0].servers[0].sockets[0].getsockname()
        assert host == "127.0.0.1"
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", timeout=SECONDS) as client:
            (card,) = client.models.list()
            assert (card.id, card.max_model_len) == ("mine", 64)
            answer = client.completions.create(model="mine", prompt="ba du", max_tokens=8, temperature=0)
    finally:
        for server in servers:
            server.should_exit = True
        thread.join(SECONDS)
    assert not thread.is_alive() and outcome[0][0] == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    ids = tokenizer("ba du", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert answer.choices[0].text == tokenizer.decode(plain, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--api-key", ""), "`--api-key` must be a key, got an empty one."),
        (("--api-key", "schlüssel"), "`--api-key` must be of visible ASCII characters"),
        (("--context", "100000"), "`--context` must be at most the target's 512 positions, got 100000."),
        (("--scheduler", "eager"), "'eager' is not one of 'fixed', 'threshold', 'hardware_aware'"),
        (("--num-drafts", "16"), "`--num-drafts` must lie in [1, 15]"),
        (("--max-rows", "0"), "--max-rows"),
    ],
)
def test_slips_are_named(tmp_path, arguments, message):
    """A server starts with a key that nobody can send, or tells of a slip once clients wait."""
    code, output = _run(str(write_tiny_pair(tmp_path)[0]), *arguments)
    assert code == 2 and message in output


def test_a_missing_extra_is_named(monkeypatch):
    """Without the server's packages the command ends in a traceback."""
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest))
    code, output = _run("anything")
    assert code == 2 and 'needs uvicorn: run `pip install "dspark-hf[serve]"`' in output
