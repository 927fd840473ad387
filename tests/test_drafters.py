"""The drafters in this repository load, are small, and are packed as their model cards say."""

from __future__ import annotations

import ast
import json
import runpy
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.demo.tiny import write_tiny_pair
from dspark_hf.modeling.formats.remote_code import write_custom_generate

DRAFTERS = Path(__file__).parent.parent / "drafters"
# a clone of the newest commit has to stay below 60 MB; every replacement adds two thirds of its size to a full one
MAX_BYTES = {"smollm2-135m-instruct": 28_000_000, "gemma3-270m": 28_000_000}


def _shipped(name: str) -> Path:
    """Return the folder of a drafter, where there is one."""
    folder = DRAFTERS / name
    if not (folder / "config.json").is_file():
        pytest.skip("a source archive holds no weights")
    return folder


@pytest.mark.parametrize("name", MAX_BYTES)
def test_shipped_drafters_load_and_are_small(name: str) -> None:
    """The demo fails, or a clone grows beyond what it may."""
    folder = _shipped(name)
    drafter, info = DSparkAssistantModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert drafter.block_size == 7
    assert drafter.confidence_head is not None
    assert (folder / "model.safetensors").stat().st_size <= MAX_BYTES[name]
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize("name", MAX_BYTES)
def test_shipped_drafters_can_be_named_in_generate(name: str, tmp_path: Path) -> None:
    """A drafter's folder in the repository lacks what every folder gets that is saved today, or has an older form."""
    folder = _shipped(name)
    write_custom_generate(tmp_path)
    for path in (tmp_path / "custom_generate").iterdir():
        shipped = folder / "custom_generate" / path.name
        assert shipped.read_text(encoding="utf-8") == path.read_text(encoding="utf-8")


def test_packing_rounds_to_the_nearest() -> None:
    """Packed weights would lie further from the trained ones than they have to."""
    round_mantissa = runpy.run_path(str(DRAFTERS / "pack.py"))["round_mantissa"]
    weights = torch.randn(4096).to(torch.bfloat16)
    rounded = round_mantissa(weights, 4)
    assert torch.equal(round_mantissa(rounded, 4), rounded)
    # half a step of four mantissa bits, relative to the power of two below
    power = torch.exp2(weights.float().abs().log2().floor())
    assert ((rounded.float() - weights.float()).abs() <= power / 32).all()
    assert round_mantissa(torch.tensor([0.0, 1.0, -2.0]).bfloat16(), 4).tolist() == [0.0, 1.0, -2.0]


def test_packing_names_the_target_that_users_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shipped folder names a folder of ours as its target, brings that one's tokenizer, or loses its card."""
    target, _ = write_tiny_pair(tmp_path)
    trained, shipped = tmp_path / "drafter", tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "README.md").write_text("what is known of it", encoding="utf-8")
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": str(target), "target_fingerprint": "0123456789abcdef"}
    (trained / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in trained.glob("tokenizer*"):
        path.unlink()
    monkeypatch.setattr(sys, "argv", ["pack.py", str(trained), str(shipped), "--target", "someone/model"])
    runpy.run_path(str(DRAFTERS / "pack.py"))["main"]()
    packed = DSparkAssistantModel.from_pretrained(shipped)
    assert packed.config.base_model_name_or_path == "someone/model"
    assert packed.config.target_fingerprint is None
    assert not list(shipped.glob("tokenizer*"))
    assert (shipped / "README.md").read_text(encoding="utf-8") == "what is known of it"


def test_prompts_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of the shipped drafter cannot be repeated, or holds questions that were answered or put aside."""
    questions = [f"Tom has {count} apples and eats {count - 3}. How many are left?" for count in range(3, 800)]
    answer = "The first sentence is about loaves of bread. The second one tells what they cost. A third ends it all."
    chats = [{"user": questions[count], "assistant": f"{answer} {count} loaves are sold."} for count in range(40)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"turns": [one]}) + "\n" for one in questions))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chats))

    def make(name: str, *options: str) -> list[dict]:
        arguments = ["make_prompts.py", "--count", "160", "--questions", str(tmp_path / "questions.jsonl"), *options]
        arguments += ["--chats", str(tmp_path / "chats.jsonl"), "--output", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", [*arguments, "--left-out", str(tmp_path / "left.jsonl")])
        # the standard library's own files, but few of them
        script = runpy.run_path(str(DRAFTERS / "make_prompts.py"))
        monkeypatch.setitem(script["main"].__globals__, "find_functions", lambda: list(functions))
        functions = script["_functions_of"](ast.parse(source), source.splitlines())
        script["main"]()
        return [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]

    source = Path(textwrap.__file__).read_text(encoding="utf-8")
    first, second = make("first.jsonl"), make("second.jsonl")
    assert first == second
    kinds = Counter(one["kind"] for one in first)
    assert kinds["question"] == 46
    assert kinds["mend"] == kinds["complete"] == 16
    texts = [one["turns"][0] for one in first]
    assert len(set(texts)) == len(texts)
    left = [json.loads(line)["turns"][0] for line in (tmp_path / "left.jsonl").open(encoding="utf-8")]
    assert len(left) == 500
    assert not set(texts) & {*left, *questions[:40]}

    beginnings = make("base.jsonl", "--base-model")
    kinds = Counter(one["kind"] for one in beginnings)
    assert kinds["question"] == 99
    assert kinds["continue code"] == 27
    asked = [one["turns"][0] for one in beginnings if one["kind"] == "question"]
    assert all(any(question in one for question in questions[40:]) for one in asked)
    assert any(one.endswith("\nAnswer:") for one in asked)
    assert not any(question in one for one in asked for question in left)
