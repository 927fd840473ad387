"""The code of the first page runs as it is pasted, on tiny models in place of the real ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_hf import DSparkAssistantModel
from dspark_hf.modeling.deepseek_v4.tiny import write_tiny_checkpoint
from tests.tiny import tiny_target
from tests.training.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


def _run(block: str, names: dict[str, str], tokens: int) -> dict[str, Any]:
    """Run a block with other models' names and shorter answers; the rest stays as a reader pastes it."""
    for real, tiny in names.items():
        assert f'"{real}"' in block
        block = block.replace(f'"{real}"', repr(tiny))
    # another name would be looked for on the hub, and its line left untried
    named = re.findall(r'(?:from_pretrained\(|pipeline\("text-generation", )"([^"]+)"', block)
    assert set(named) <= set(names.values()), block
    block, count = re.subn(r"max_new_tokens=\d+", f"max_new_tokens={tokens}", block)
    assert count == 1
    left: dict[str, Any] = {}
    exec(block, left)
    return left


@pytest.fixture
def pair(tmp_path) -> dict[str, str]:
    """A target with a chat template, and a drafter for it."""
    target = tiny_target("qwen3")
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "target")
    drafter = DSparkAssistantModel.from_target(target, num_hidden_layers=1, markov_rank=8)
    drafter.save_pretrained(tmp_path / "drafter")
    return {
        "Qwen/Qwen3-8B": str(tmp_path / "target"),
        "deepseek-ai/dspark_qwen3_8b_block7": str(tmp_path / "drafter"),
    }


def test_first_block(pair, capsys):
    """A newcomer pastes the first code of all, and it fails, or says nothing of what the drafter did."""
    left = _run(BLOCKS[0], pair, tokens=12)
    printed = capsys.readouterr().out
    assert "tau " in printed
    assert left["answer"][0]["generated_text"][-1]["content"] in printed
    # a pipeline samples unless it is told not to
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = left["pipe"](left["messages"], **options)
    assert left["pipe"](left["messages"], assistant_model=left["drafter"], **options) == plain
    assert left["drafter"].last_statistics.num_rounds > 0


def test_block_of_generate(pair, capsys):
    """A user of `generate` pastes its lines, and they fail, or say nothing of what the drafter did."""
    left = _run(BLOCKS[1], pair, tokens=12)
    printed = capsys.readouterr().out
    assert "tau " in printed
    plain = left["target"].generate(**left["inputs"], max_new_tokens=12)
    assert torch.equal(left["output"], plain)
    text = left["tokenizer"].decode(plain[0, left["inputs"]["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text in printed
    assert left["drafter"].last_statistics.num_rounds > 0


def test_every_block_is_run():
    """A block of code is added to the first page, and no test runs it."""
    assert len(BLOCKS) == 3, "run the new block here, too"


@pytest.mark.parametrize("block", BLOCKS, ids=["pipeline", "generate", "deepseek-v4"])
def test_chat_models_are_asked_through_their_template(block):
    """A chat model is asked without its template, and answers with nothing but an end."""
    # a pipeline that is given messages applies the template itself
    is_asked_with_messages = 'pipeline("text-generation"' in block and "pipe(messages" in block
    assert is_asked_with_messages or ("apply_chat_template(" in block and "add_generation_prompt=True" in block)
    assert not re.search(r"\btokenizer\(", block)


def test_deepseek_v4_block(tmp_path, capsys):
    """The block of DeepSeek-V4 uses what it does not define."""
    write_tiny_checkpoint(tmp_path / "tiny", seed=0, experts="bf16", with_dspark=True)
    _run(BLOCKS[2], {"deepseek-ai/DeepSeek-V4-Flash-DSpark": str(tmp_path / "tiny")}, tokens=6)
    assert "tau " in capsys.readouterr().out
