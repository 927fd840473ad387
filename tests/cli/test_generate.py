"""`dspark-hf generate` and `dspark-hf chat`: prompts from arguments and pipes, answers as text and as JSON."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dspark_hf.cli import answering
from dspark_hf.cli.answering import Asked, drafter_for
from dspark_hf.cli.hints import say_next
from dspark_hf.cli.main import app
from dspark_hf.cli.options import PackagedModel, Scheduler, is_packaged, packaged_folder
from dspark_hf.demo.packaged import PACKAGED_MODELS
from dspark_hf.demo.tiny import write_tiny_pair
from dspark_hf.generation.scheduling.choosing import SCHEDULERS
from dspark_hf.registry.finding import register_drafter


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    """A tiny target and its drafter, as folders."""
    target, drafter = write_tiny_pair(tmp_path_factory.mktemp("pair"))
    return str(target), str(drafter)


def _run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*arguments], input=stdin, env={"COLUMNS": "500", "NO_COLOR": "1"})
    return result.exit_code, result.stdout, " ".join(result.stderr.replace("│", " ").split())


def _plain(target: str, prompt: str) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    inputs = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)


def test_an_answer_goes_into_a_pipe(pair):
    """A pipe gets numbers and hints with the text, or another text than plain `generate` writes."""
    target, drafter = pair
    expected = _plain(target, "ba du")
    code, out, err = _run("generate", target, "ba du", "--drafter", drafter, "--max-new-tokens", "8", "--plain")
    assert (code, out) == (0, f"{expected}\n{expected}\n")
    assert "tokens/s" in err and "Identical text." in err
    # without a drafter, from standard input
    code, out, _ = _run("generate", target, "--max-new-tokens", "8", "--json", stdin="ba du")
    assert code == 0 and json.loads(out)["text"] == expected


def test_each_line_of_a_pipe_is_a_question(pair):
    """A chat needs a terminal, or a program cannot tell answers apart."""
    target, _ = pair
    code, out, err = _run("chat", target, "--max-new-tokens", "8", "--json", stdin="ba du\n\nfo ka\n/quit\nba\n")
    first, second = map(json.loads, out.splitlines())
    expected = _plain(target, "ba du")
    assert code == 0 and first["text"] == expected
    assert second["text"] == _plain(target, f"ba du\n\n{expected}\n\nfo ka")
    assert "has no chat template" in err
    assert _run("chat", target, "--json", stdin="/nonsense\n")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ba", "--seed", "1"], "`--seed` must be left out of greedy answers"),
        (["ba", "--top-p", "0.5"], "`--top-p` must be left out of greedy answers"),
        (["ba", "--temperature", "1", "--top-p", "0"], "`--top-p` must lie in (0, 1]"),
        (["ba", "--temperature", "inf"], "`--temperature` must be a number from 0 on"),
        (["ba", "--raw", "--system", "fo"], "`--raw` must come without"),
        ([], "`PROMPT` must hold some text"),
        (["ba", "--scheduler", "eager"], "'eager' is not one of 'fixed', 'threshold', 'hardware_aware'"),
        (["ba", "--num-drafts", "0"], "Invalid value for '--num-drafts'"),
        (["ba", "--drafter", "DRAFTER", "--num-drafts", "9"], "`--num-drafts` must lie in [1, 7]"),
        (["ba", "--drafter", "/no/where"], "`--drafter` must be the folder or hub name of a DSpark drafter"),
        (["ba", "--thinking"], "has no `enable_thinking`"),
        (["ba", "--template-option", "a=1"], "`--template-option` must name something"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_told(pair, arguments, message, monkeypatch):
    """An option is ignored without a word, or told after the models were loaded for minutes."""
    monkeypatch.setattr("dspark_hf.loading.load_target", lambda *_, **__: pytest.fail("loaded"))
    arguments = [pair[1] if word == "DRAFTER" else word for word in arguments]
    code, out, err = _run("generate", pair[0], *arguments)
    assert (code, out) == (2, "") and message in err


def test_drafts_go_as_they_were_told(pair, monkeypatch):
    """`--scheduler` or `--num-drafts` is taken and forgotten, or changes the text."""
    target, drafter = pair
    speakers: list[Any] = []
    original = answering.open_speaker
    monkeypatch.setattr(answering, "open_speaker", lambda *given: speakers.append(original(*given)) or speakers[-1])
    options = ["--drafter", drafter, "--max-new-tokens", "8", "--json"]
    expected = _plain(target, "ba du")
    for count in (1, 3):
        told = [*options, "--scheduler", "fixed", "--num-drafts", str(count)]
        for arguments, stdin in (("generate", target, "ba du", *told), ""), (("chat", target, *told), "ba du\n"):
            code, out, _ = _run(*arguments, stdin=stdin)
            assert code == 0 and json.loads(out)["text"] == expected
            statistics = speakers[-1].drafter.last_statistics
            assert statistics.scheduler == "fixed" and len(statistics.verified_by_position) == count
    # without them the default has the word
    _run("generate", target, "ba du", *options)
    assert speakers[-1].drafter.last_statistics.scheduler == "adaptive"


def test_more_drafts_than_there_are_slots_for_are_refused(pair, monkeypatch):
    """`--num-drafts` of a drafter that is found by itself is told at the first answer, deep in the package."""
    code, out, err = _run("generate", pair[0], "ba", "--num-drafts", "16")
    assert (code, out) == (2, "") and "`--num-drafts` must lie in [1, 15] for the drafter that is known" in err


def test_a_wrong_model_is_told_by_its_own_name(tmp_path):
    """The message names an option that the command does not have."""
    for command in (["generate", str(tmp_path / "no"), "ba"], ["chat", str(tmp_path / "no")]):
        code, _, err = _run(*command)
        assert code == 2 and "`MODEL` must be the folder or hub name" in err


def test_the_drafter_that_is_known_is_taken(pair, monkeypatch):
    """A target answers without the drafter that is known for it, or one that is named is not used."""
    target = AutoModelForCausalLM.from_pretrained(pair[0])
    named: list[str] = []

    class Loaded:
        def to(self, device):
            return self

    monkeypatch.setattr("dspark_hf.loading.load_drafter", lambda name, **_: named.append(name) or Loaded())
    register_drafter(pair[1], target)
    known = drafter_for(target, Asked(pair[0], None, "auto", "cpu"))
    assert known.name_or_path == pair[1] and not named
    drafter_for(target, Asked(pair[0], "mine", "auto", "cpu"))
    assert named == ["mine"]


def test_short_names_are_those_of_packaged_models(tmp_path, monkeypatch):
    """A packaged model has no short name, or a folder of the user's that is called so is passed over."""
    assert {model.value for model in PackagedModel} == set(PACKAGED_MODELS)
    assert {scheduler.value for scheduler in Scheduler} == set(SCHEDULERS)
    monkeypatch.chdir(tmp_path)
    assert is_packaged("smollm2") and not is_packaged("smollm3")
    (tmp_path / "smollm2").mkdir()
    assert not is_packaged("smollm2") and packaged_folder("smollm2") == "smollm2"


def test_the_next_command_calls_a_model_as_its_user_did(tmp_path, monkeypatch):
    """A packaged model's next command names a folder deep in a cache, which nobody typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dspark_hf.demo.packaged.converted_target", lambda name: tmp_path / "cache" / name)
    console = Console(file=io.StringIO(), width=200)
    for given in ("smollm2", "some folder"):
        say_next(console, "chat", str(packaged_folder(given)))
    assert console.file.getvalue().splitlines() == [
        "Next: dspark-hf chat smollm2",
        "Next: dspark-hf chat 'some folder'",
    ]
