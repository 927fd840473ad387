"""`dspark-hf data`: what is asked for is collected, and mistakes are told before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from dspark_hf import DSparkAssistantModel
from dspark_hf.cli.data import data
from dspark_hf.data import session as collecting
from dspark_hf.journal import Journal
from dspark_hf.training.conversations import read_conversations
from tests.data.test_server import serving
from tests.tiny import tiny_target
from tests.training.tiny_tokenizer import tiny_tokenizer

app = typer.Typer()
app.command()(data)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "tiny-chat"
    tiny_target("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "tiny-base"
    tiny_target("llama").save_pretrained(folder)
    tiny_tokenizer(chat_template=None).save_pretrained(folder)
    return folder


def _run(target: Any, output: Path, *arguments: Any) -> Result:
    options = ["--target", target, "--output", output, "--max-new-tokens", 12, *arguments]
    # a wide terminal: no message is broken into lines
    return CliRunner().invoke(app, [str(option) for option in options], terminal_width=400, env={"COLUMNS": "400"})


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_prompts_are_answered(target: Path, tmp_path: Path) -> None:
    """The trainer would get no conversations, or ones on held-out prompts."""
    prompts = _write(tmp_path / "prompts.jsonl", *({"turns": [f"w{index} w9"]} for index in range(20, 26)))
    exclude = _write(tmp_path / "eval.jsonl", {"turns": ["W21  w9!"]})
    output = tmp_path / "chats.jsonl"
    result = _run(target, output, "--prompts", prompts, "--exclude", exclude, "--sampling", "1.0")
    assert result.exit_code == 0, result.output
    assert "5 conversations in" in result.output and "5 of them new" in result.output
    asked = {record["prompt"][0]["content"] for record in _records(output)}
    assert asked == {f"w{index} w9" for index in (20, 22, 23, 24, 25)}
    assert {(record["target"], record["source"]) for record in _records(output)} == {("tiny-chat", "prompts.jsonl")}
    assert read_conversations(output, tiny_tokenizer())
    again = _run(target, output, "--prompts", prompts, "--exclude", exclude, "--sampling", "1.0")
    assert "0 of them new" in again.output


def test_the_target_writes_its_own_prompts(target: Path, tmp_path: Path) -> None:
    """Without a set of prompts there would be no training data."""
    output = tmp_path / "chats.jsonl"
    arguments = ("--max-prompt-tokens", 200, "--opening", "w20", "--opening", "w21")
    result = _run(target, output, "--num-conversations", 3, *arguments)
    assert result.exit_code == 0, result.output
    assert _run(target, output, "--num-conversations", 5, *arguments).exit_code == 0
    records = _records(output)
    assert len(records) == 5
    turns = [record["prompt"][0]["content"] for record in records]
    assert len(set(turns)) == 5
    assert all(turn.startswith(("w20", "w21")) for turn in turns)
    saved = [record["turns"][0] for record in _records(tmp_path / "chats.jsonl.prompts")]
    assert set(turns) <= set(saved)


def test_base_models_continue_texts(base_target: Path, tmp_path: Path) -> None:
    """A base model's drafter could not be trained."""
    prompts = _write(tmp_path / "texts.jsonl", {"prompt": "w20 w21 w22 w23"}, {"turns": ["w30 w31 w32 w33"]})
    output = tmp_path / "texts-out.jsonl"
    result = _run(base_target, output, "--prompts", prompts, "--max-prompt-tokens", 2)
    assert result.exit_code == 0, result.output
    assert {record["prompt"] for record in _records(output)} == {"w20 w21", "w30 w31 w32 w33"}
    own = tmp_path / "own.jsonl"
    assert _run(base_target, own, "--num-conversations", 3, "--max-prompt-tokens", 4).exit_code == 0
    assert all(isinstance(record["completion"], str) for record in _records(own))


def test_a_drafter_changes_no_answer(target: Path, tmp_path: Path) -> None:
    """The faster way would write other data."""
    torch.manual_seed(0)
    drafter = DSparkAssistantModel.from_target(tiny_target("llama"), num_hidden_layers=1, block_size=4, markov_rank=8)
    drafter.save_pretrained(tmp_path / "drafter")
    prompts = _write(tmp_path / "prompts.jsonl", *({"turns": [f"w{index}"]} for index in range(20, 24)))
    options = ("--prompts", prompts, "--sampling", "greedy")
    plain, assisted = tmp_path / "plain.jsonl", tmp_path / "assisted.jsonl"
    assert _run(target, plain, *options).exit_code == 0
    result = _run(target, assisted, *options, "--drafter", tmp_path / "drafter")
    assert result.exit_code == 0, result.output

    def by_prompt(record: dict[str, Any]) -> str:
        return json.dumps(record["prompt"])

    assert sorted(_records(assisted), key=by_prompt) == sorted(_records(plain), key=by_prompt)


def test_a_server_answers(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large targets, which only a server can hold, would get no data; or a key would be written down."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("DSPARK_HF_API_KEY", "secret")
    output, tokenizer = tmp_path / "chats.jsonl", tmp_path / "tokenizer"
    # no weights, and no configuration of a model
    tiny_tokenizer().save_pretrained(tokenizer)
    reply = 200, {"choices": [{"text": "w9 w10", "message": None, "finish_reason": "stop"}]}, {}
    with serving(lambda path, _: (404, b"", {}) if path == "/v1/models" else reply) as server:
        prompts = _write(tmp_path / "prompts.jsonl", {"prompt": "w20 w21"}, {"turns": ["w22"]})
        result = _run(tokenizer, output, "--prompts", prompts, "--server", server.url, "--model", "big")
    assert result.exit_code == 0, result.output
    assert [record["target"] for record in _records(output)] == ["big", "big"]
    assert "completion_ids" not in _records(output)[0]
    assert "secret" not in output.read_text(encoding="utf-8") + result.output


def test_prompts_that_do_not_fit_are_left_out(target: Path, tmp_path: Path) -> None:
    """A single long prompt would end the run, or be answered at positions the target never saw."""
    prompts = _write(tmp_path / "prompts.jsonl", {"turns": ["w9"]}, {"turns": ["w9 " * 250]})
    result = _run(target, tmp_path / "chats.jsonl", "--prompts", prompts)
    assert result.exit_code == 0, result.output
    assert "1 prompts were left out" in result.output
    assert len(_records(tmp_path / "chats.jsonl")) == 1


def test_too_few_prompts_are_told(target: Path, tmp_path: Path) -> None:
    """A run would end early without saying why."""
    prompts = _write(tmp_path / "prompts.jsonl", {"turns": ["w9"]})
    result = _run(target, tmp_path / "chats.jsonl", "--prompts", prompts, "--num-conversations", 4)
    assert result.exit_code == 0
    assert "1 conversations in" in result.output and "There are no more prompts" in result.output


def test_an_interrupted_run_says_how_to_go_on(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C would end in a stack of calls, and nobody would know that nothing is lost."""

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(collecting.Collector, "run", interrupt)
    prompts = _write(tmp_path / "prompts.jsonl", {"turns": ["w9"]})
    result = _run(target, tmp_path / "chats.jsonl", "--prompts", prompts)
    assert result.exit_code == 130
    assert "the same command goes on where it was" in result.output
    Journal(tmp_path / "chats.jsonl").close()


def test_a_file_in_use_is_told(target: Path, tmp_path: Path) -> None:
    """Two runs on one file would end in a stack of calls."""
    with Journal(tmp_path / "chats.jsonl"):
        result = _run(target, tmp_path / "chats.jsonl", "--num-conversations", 2)
    assert result.exit_code == 1
    assert "must be written by one run at a time" in result.output


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.prompts"])
def test_a_file_of_another_kind_is_not_changed(name: str, target: Path, tmp_path: Path) -> None:
    """A file that somebody named by mistake is cut, and the command says that all went well."""
    precious = tmp_path / name
    precious.write_text(json.dumps([{"messages": [{"role": "user", "content": "precious"}]}] * 200))
    before = precious.read_bytes()
    result = _run(target, tmp_path / "chats.jsonl", "--num-conversations", 1)
    assert result.exit_code == 2
    assert "must hold one JSON object a line" in " ".join(result.output.replace("│", " ").split())
    assert precious.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "`--num-conversations` must be given when the target writes its own prompts"),
        (("--prompts", "PROMPTS", "--dataset", "x"), "`--prompts` and `--dataset` must not be given together"),
        (("--prompts", "PROMPTS", "--opening", "x"), "`--opening` must be given for prompts that the target writes"),
        (("--prompts", "none.jsonl"), "`--prompts` must be a file, got 'none.jsonl'"),
        (("--prompts", "PROMPTS", "--exclude", "none.jsonl"), "`--exclude` must be a file, got 'none.jsonl'"),
        (("--prompts", "PROMPTS", "--exclude", "PROMPTS"), "must hold prompts that `--exclude` does not name"),
        (("--prompts", "PROMPTS", "--output", "PROMPTS"), "`--output` must be another file than `--prompts`"),
        (("--prompts", "PROMPTS", "--output", "FOLDER"), "`--output` must be a file, got the folder"),
        (("--prompts", "PROMPTS", "--sampling", "warm"), "`sampling` must be greedy, TEMPERATURE or"),
        (
            ("--prompts", "PROMPTS", "--sampling", "greedy", "--samples-per-prompt", "2"),
            "`--samples-per-prompt` must be 1 with greedy decoding alone, got 2",
        ),
        (("--prompts", "PROMPTS", "--model", "x"), "`--model` must come with `--server`"),
        (("--prompts", "PROMPTS", "--server", "http://x", "--drafter", "y"), "`--drafter` must be left out with"),
        (("--prompts", "PROMPTS", "--server", "x"), "`server` must be an http address, got 'x'"),
        (("--prompts", "PROMPTS", "--device", "abacus"), "`--device` must be auto or a device PyTorch can use"),
        (("--prompts", "PROMPTS", "--target", "FOLDER"), "`--target` must be the folder or hub name of a causal"),
        (("--prompts", "PROMPTS", "--drafter", "FOLDER"), "`--drafter` must be the folder or hub name of a DSpark"),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], message: str, target: Path, tmp_path: Path) -> None:
    """Hours of work would end in a mistake that was there from the start."""
    prompts = _write(tmp_path / "prompts.jsonl", {"turns": ["w9"]})
    places = {"PROMPTS": prompts, "FOLDER": tmp_path}
    result = _run(target, tmp_path / "chats.jsonl", *(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    # a frame around the message may break its lines all the same
    assert message in " ".join(result.output.replace("│", " ").split())
