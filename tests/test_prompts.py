"""Prompt files of every layout become what the target reads, and a wrong line is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dspark_hf.prompts import Prompt, encode_prompt, parse_prompt, plain_text, read_prompts, user_turn

WORDS = ["<unk>", "<bos>", "<user>", "<model>", "a", "b", "c"]
TEMPLATE = (
    "<bos> {% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<model> {% endif %}"
)


def _tokenizer(*, template: str | None = TEMPLATE, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        model.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<bos>")
    fast.chat_template = template
    return fast


def _words(token_ids: torch.Tensor) -> str:
    return " ".join(WORDS[token] for token in token_ids.tolist())


def _write(path: Path, *records: Any) -> Path:
    path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def test_every_layout_is_read(tmp_path: Path) -> None:
    """Prompt sets of another source could not be used, or would be asked in another role."""
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    answer, follow_up = {"role": "assistant", "content": "w"}, {"role": "user", "content": "f"}
    path = _write(
        tmp_path / "prompts.jsonl",
        {"turns": ["q", "later"], "source": "x"},
        {"messages": [system, {**user, "name": "n"}, answer, follow_up, answer]},
        {"prompt": [user], "completion": [answer]},
        {"prompt": "raw"},
        {"user": "q", "assistant": "w"},
    )
    assert read_prompts(path) == [
        user_turn("q"),
        Prompt(messages=(system, user, answer, follow_up)),
        user_turn("q"),
        Prompt(text="raw"),
        user_turn("q"),
    ]
    assert len(read_prompts(path, limit=2)) == 2


def test_text_file_holds_a_user_turn_a_line(tmp_path: Path) -> None:
    """The simplest file of all would not be read."""
    path = tmp_path / "prompts.txt"
    path.write_text("one \n\n{two}\n", encoding="utf-8")
    assert read_prompts(path) == [user_turn("one"), user_turn("{two}")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oh", r"prompts.jsonl` must hold one JSON object a line, got '\{oh' on line 2"),
        ('{"text": "a"}', r"prompts.jsonl`, line 2: a prompt must be one of .* got \['text'\]"),
        ('["a"]', "line 2: a prompt must be one of"),
        ('{"turns": []}', "line 2: a prompt must be one of"),
        ('{"prompt": " "}', "line 2: a prompt must be one of"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "line 2: messages must be objects"),
        ('{"messages": [{"role": "system", "content": "a"}]}', r"must hold a user turn, got the roles \['system'\]"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    """A long file would fail without saying where, or a prompt would be lost in silence."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"turns": ["a"]}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    """A run over no prompt would report success."""
    with pytest.raises(ValueError, match="must hold at least one prompt"):
        read_prompts(_write(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("fields", [{}, {"messages": (), "text": ""}])
def test_a_prompt_is_one_thing(fields: dict[str, Any]) -> None:
    """A prompt could mean two things, or nothing."""
    with pytest.raises(ValueError, match="must have either `messages` or `text`"):
        Prompt(**fields)


def test_messages_go_through_the_template_once() -> None:
    """The target would see its BOS token twice, or answer without knowing that it is its turn."""
    assert _words(encode_prompt(user_turn("a b"), _tokenizer())) == "<bos> <user> a b <model>"


def test_without_a_template_messages_are_text() -> None:
    """A base model could not be given a question."""
    prompt = parse_prompt({"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b c"}]})
    token_ids = encode_prompt(prompt, _tokenizer(template=None))
    assert token_ids.dtype == torch.int64
    assert _words(token_ids) == "<bos> a b c"
    assert plain_text(prompt) == "a\n\nb c"


def test_text_is_continued_as_it_is() -> None:
    """Raw text would be wrapped in a user turn, or miss its BOS token."""
    assert _words(encode_prompt(Prompt(text="a b"), _tokenizer())) == "<bos> a b"


def test_empty_text_is_the_bos_token() -> None:
    """A base model could not write from nothing, or `generate` would get a row without tokens."""
    assert _words(encode_prompt(Prompt(text=""), _tokenizer(adds_bos=False))) == "<bos>"
    without_bos = _tokenizer(adds_bos=False)
    without_bos.bos_token = None
    with pytest.raises(ValueError, match="must have at least one token"):
        encode_prompt(Prompt(text=""), without_bos)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"user": "caf\xe9"}', "must be UTF-8, got the byte 0xe9 on line 2"),
        (b"[" * 100_000, r"must hold one JSON object a line, got .* on line 2 \(too deep\)"),
        (b'{"messages": 3}', "line 2: messages must be objects"),
        (b'{"user": "\\ud800"}', "line 2: a prompt must be one of"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    """One bad line ends in a stack of calls that names neither file nor line."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"user": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message) as failure:
        read_prompts(path)
    assert str(path) in str(failure.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_pipe_is_no_file_of_prompts(tmp_path: Path) -> None:
    """A command waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a file"):
        read_prompts(tmp_path / "pipe")
