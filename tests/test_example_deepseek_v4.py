"""The example of inference with DeepSeek-V4, on a tiny checkpoint in the released layout."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark_hf.cli.main import app
from dspark_hf.modeling.deepseek_v4.chat import encode_messages
from tests.thinning import slow

EXAMPLE = Path(__file__).parent.parent / "examples" / "deepseek_v4_inference.py"
LENGTH = 5


def _write(folder: Path, *options: str) -> Path:
    assert CliRunner().invoke(app, ["tiny-v4", "--out", str(folder), *options]).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a checkpoint with FP8 and FP4 weights, a DSpark module and a tokenizer."""
    return _write(tmp_path_factory.mktemp("example") / "tiny")


@pytest.fixture
def infer(checkpoint, monkeypatch, capsys):
    """Return a function that runs the example and returns what it prints."""

    def run(*options: str, target: Path = checkpoint) -> str:
        arguments = [EXAMPLE.name, str(target), "--max-new-tokens", str(LENGTH), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capsys.readouterr().out

    return run


def _streamed(printed: str, heading: str) -> str:
    return printed.partition(f"{heading}\n")[2].partition(f"\n{LENGTH} tokens, ")[0]


@pytest.mark.parametrize("modes", [("think-max",), slow(("non-think", "think-high", "think-max"))], ids=len)
def test_thinks_as_asked(infer, modes):
    """In some mode the drafter changes the text, or a mode does not reach the prompt."""
    modes = [["--mode", mode] for mode in modes]
    # its "max" is the default release's "high"
    modes.append(["--release", "preview", "--mode", "think-high"])
    texts = set()
    for mode in modes:
        printed = infer(*mode, "--dtype", "float32", "--compare")
        assert "The texts are identical" in printed
        assert _streamed(printed, "Plain") == _streamed(printed, "DSpark")
        assert printed.count(", tau ") == 1
        # so few random tokens have no end
        assert "Not parsed: `text` must end with" in printed
        # a reader must not take that for a fault
        assert "random weights" in printed
        texts.add(_streamed(printed, "Plain"))
    assert len(texts) == len(modes)


def test_text_is_the_same_by_any_way(infer):
    """The text depends on the drafter, or on whether it is printed as it is written."""
    text = _streamed(infer("--dtype", "float32", "--no-dspark"), "Plain")
    assert text
    assert _streamed(infer("--dtype", "float32"), "DSpark") == text
    whole = infer("--dtype", "float32", "--no-stream")
    assert whole.startswith(f"\nDSpark\n{LENGTH} tokens, ")
    assert f"\n{text}\n" in whole


@pytest.mark.parametrize(
    "options",
    [
        slow([]),
        slow(["--dtype", "bfloat16", "--device-map", "cpu"]),
        slow(["--dtype", "float32", "--keep-quantized", "--cache-dtype", "fp8"]),
        ["--no-keep-quantized", "--cache-dtype", "fp8", "--indexer-dtype", "fp4", "--temperature", "0.7"],
    ],
    ids=" ".join,
)
def test_loads_as_asked(infer, options):
    """Some choice of weights, dtype, cache or device fails with the drafter in the checkpoint."""
    printed = infer(*options)
    assert f"\n{LENGTH} tokens, " in printed
    assert "tokens per round" in printed


def test_tools(infer, tmp_path):
    """Tools do not reach the prompt."""
    schema = tmp_path / "tools.json"
    schema.write_text('[{"type": "function", "function": {"name": "add", "parameters": {}}}]', encoding="utf-8")
    plain, informed = infer("--no-dspark"), infer("--no-dspark", "--tools", str(schema))
    assert _streamed(plain, "Plain") != _streamed(informed, "Plain")


@pytest.mark.parametrize(("effort", "num_characters"), [("high", 5), ("none", 0)])
def test_parts_of_an_answer(capsys, effort, num_characters):
    """Reasoning, content and tool calls are mixed up, or an answer without reasoning is refused."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "2"}}}
    answer = {"role": "assistant", "reasoning_content": "Easy.", "content": "I add.", "tool_calls": [call]}
    messages = [{"role": "user", "content": "2 + 2?"}, answer]
    prompt = encode_messages(messages[:1], reasoning_effort=effort)
    text = encode_messages(messages, reasoning_effort=effort).removeprefix(prompt)
    runpy.run_path(str(EXAMPLE))["show"](text, is_thinking=effort != "none")
    assert capsys.readouterr().out.strip().splitlines() == [
        f"Reasoning: {num_characters} characters",
        "Content: I add.",
        "Tool call: add {'a': 2, 'b': '2'}",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reasoning-effort", "medium"], "`reasoning_effort` must be one of none, low, high, max .* got medium"),
        (["--release", "0101"], "`release` must be one of preview, 0731, 0813, got '0101'"),
        (["--dtype", "int8"], "`dtype` must be a floating-point dtype, got 'int8'"),
        (["--cache-dtype", "int8"], "`cache_dtype` must be None or 'fp8', got 'int8'"),
        (["--device-map", "gpu"], "`device_map` must be one of auto, .* got 'gpu'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_told(infer, options, message):
    """A user reads a traceback."""
    with pytest.raises(SystemExit, match=f"^Error: {message}"):
        infer(*options)


def test_mistaken_targets_and_files_are_told(infer, tmp_path, capsys):
    """A checkpoint that is not there, or has no DSpark module, or a file of tools is met with a traceback."""
    with pytest.raises(SystemExit, match="^Error: `--target` must be the folder or hub name"):
        infer(target=tmp_path / "absent")
    plain = _write(tmp_path / "plain", "--no-dspark")
    with pytest.raises(SystemExit, match="^Error: `use_dspark` must be left out"):
        infer(target=plain)
    assert f"\n{LENGTH} tokens, " in infer("--no-dspark", target=plain)
    with pytest.raises(SystemExit):
        infer("--tools", str(plain / "absent.json"))
    assert "--tools: must be a JSON file, got" in capsys.readouterr().err
