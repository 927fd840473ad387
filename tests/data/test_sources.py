"""Prompts of every source come once, in the same order in every run, and never from a held-out set."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dspark_hf.data.sources import (
    HeldOut,
    ListedPrompts,
    NoNewPromptsError,
    SelfWrittenPrompts,
    for_base_model,
    normalize,
    read_dataset,
)
from dspark_hf.data.writers import Answer, LocalWriter, Sampling
from dspark_hf.journal import Journal
from dspark_hf.prompts import Prompt, end_token_id, turn_end, user_opening, user_turn
from tests.tiny import tiny_target
from tests.training.tiny_tokenizer import WORDS, tiny_tokenizer

QUESTION = "How many eggs does a duck lay in a whole week of work?"
MISTRAL_TEMPLATE = (
    "<bos>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}<eos>{% endif %}{% endfor %}"
)


class _Script:
    """A writer that writes what it is told, and remembers what it was asked."""

    batch_size = 4

    def __init__(self, *rounds: Sequence[Answer]):
        self._rounds = list(rounds)
        self.asked: list[tuple[list[str | None], dict[str, Any]]] = []

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, **options: Any) -> Iterator[tuple[int, Answer]]:
        self.asked.append(([prompt.text for prompt in prompts], {"sampling": sampling, **options}))
        answers = self._rounds.pop(0) if len(self._rounds) > 1 else self._rounds[0]
        return iter(list(enumerate(answers[: len(prompts)])))


def _turn(text: str, **fields: Any) -> Answer:
    return Answer(text, **{"is_finished": True, "num_tokens": 2, **fields})


def test_listed_prompts_come_once_and_in_order() -> None:
    """A continued run would answer other prompts, or the same one several times."""
    a, b, long = user_turn("a"), Prompt(text="a"), user_turn("long")
    source = ListedPrompts([a, b, a, long, user_turn("c")], "file", lambda prompt: prompt is not long)
    assert len(source) == 4
    assert source.take(2) == [a, b]
    assert source.take(5) == [user_turn("c")]
    assert source.take(1) == []
    assert source.num_dropped == 1


def test_a_user_turn_is_opened_as_the_template_opens_it() -> None:
    """The target would not know that it is to write a question."""
    assert user_opening(tiny_tokenizer()) == "<bos> <user> "
    assert turn_end(tiny_tokenizer(), "user") == "<end>"
    mistral = tiny_tokenizer(MISTRAL_TEMPLATE)
    assert user_opening(mistral) == "<bos>[INST] "
    assert turn_end(mistral, "user") == "[/INST]"
    assert end_token_id(mistral) == WORDS.index("<eos>")
    assert end_token_id(tiny_tokenizer()) == WORDS.index("<end>")
    with pytest.raises(ValueError, match="must write a user turn once, as it is"):
        user_opening(tiny_tokenizer("<bos> fixed"))


def test_self_written_turns_are_whole_new_and_wanted(tmp_path: Path) -> None:
    """Training would see the same question many times, half questions, or held-out ones."""
    script = _Script(
        [_turn(" What is it? "), _turn("what  IS it"), _turn("Too long", is_finished=False), _turn(" ")],
        [_turn("hi", token_ids=(3, 9, 5)), _turn("Why?", token_ids=(9, 5)), _turn(QUESTION), _turn("Who?")],
    )
    with Journal(tmp_path / "turns") as journal:
        held_out = HeldOut.from_prompts([user_turn(QUESTION)])
        source = SelfWrittenPrompts(
            script, tiny_tokenizer(), journal, max_tokens=9, is_wanted=lambda prompt: prompt not in held_out
        )
        assert source.take(4) == [user_turn("What is it?")]
        assert source.take(4) == [user_turn("Why?"), user_turn("Who?")]
    prompts, options = script.asked[0]
    assert prompts == ["<bos> <user> "] * 4
    assert options == {"sampling": Sampling(1.0), "max_new_tokens": 9, "seed": 0, "stop": "<end>"}
    assert script.asked[1][1]["seed"] != 0


def test_self_written_turns_are_not_lost(tmp_path: Path) -> None:
    """A crash before the answers would cost the questions, or the next run would write the same ones again."""
    first = _Script([_turn("a b"), _turn("c d")])
    with Journal(tmp_path / "turns") as journal:
        assert len(SelfWrittenPrompts(first, tiny_tokenizer(), journal).take(1)) == 1
    second = _Script([_turn("A b!"), _turn("e f")])
    with Journal(tmp_path / "turns") as journal:
        source = SelfWrittenPrompts(second, tiny_tokenizer(), journal)
        assert source.take(9) == [user_turn("a b"), user_turn("c d")]
        assert not second.asked
        assert source.take(9) == [user_turn("e f")]
    assert second.asked[0][1]["seed"] != first.asked[0][1]["seed"]


def test_openings_take_turns(tmp_path: Path) -> None:
    """Asked for questions about code, the target would write about anything."""
    script = _Script([_turn(" that sorts"), _turn(" of two"), _turn(" that adds"), _turn("?")])
    with Journal(tmp_path / "turns") as journal:
        source = SelfWrittenPrompts(script, tiny_tokenizer(), journal, openings=["Write code ", "Name"])
        turns = source.take(4)
    assert turns == [
        user_turn(text) for text in ("Write code that sorts", "Name of two", "Write code that adds", "Name?")
    ]
    assert script.asked[0][0][:2] == ["<bos> <user> Write code", "<bos> <user> Name"]


def test_base_models_begin_texts(tmp_path: Path) -> None:
    """A base model could not be trained for without a set of prompts."""
    script = _Script([_turn("once upon", is_finished=False), _turn("the end")])
    tokenizer = tiny_tokenizer(chat_template=None)
    with Journal(tmp_path / "turns") as journal:
        assert SelfWrittenPrompts(script, tokenizer, journal).take(3) == [Prompt(text="once upon")]
    assert script.asked[0][0][0] == "" and script.asked[0][1]["stop"] == ""
    with Journal(tmp_path / "turns") as journal:
        assert SelfWrittenPrompts(script, tokenizer, journal).take(3) == [Prompt(text="once upon")]


def test_a_target_without_ideas_is_told(tmp_path: Path) -> None:
    """A run would go on for ever without a new line."""
    script = _Script([_turn("a")])
    with Journal(tmp_path / "turns") as journal:
        source = SelfWrittenPrompts(script, tiny_tokenizer(), journal)
        source.take(1)
        with pytest.raises(NoNewPromptsError, match="must write new prompts, got none in 10 rounds beyond the 1 in"):
            source.take(1)


@pytest.mark.parametrize(
    "chat_template",
    [pytest.param(None, id="base", marks=pytest.mark.slow), pytest.param(MISTRAL_TEMPLATE, id="text_ends_a_turn")],
)
def test_a_real_target_writes_prompts(chat_template: str | None, tmp_path: Path) -> None:
    """A template's opening or end would not survive the tokenizer and `generate`."""
    tokenizer = tiny_tokenizer(chat_template)
    writer = LocalWriter(tiny_target("llama"), tokenizer, batch_size=8)
    with Journal(tmp_path / "turns") as journal:
        source = SelfWrittenPrompts(writer, tokenizer, journal, max_tokens=40)
        assert source.take(2)


@pytest.mark.parametrize(
    ("text", "is_held_out"),
    [
        (QUESTION, True),
        ("how many EGGS does a duck lay,\nin a whole week of work", True),
        (QUESTION + "\nPlease reason step by step.", True),
        ("does a duck lay in a whole week of work", True),
        # too short to be known by a part
        ("a duck lay in a whole week", False),
        ("Name it", True),
        ("Name it now, and all the others that come to your mind today", False),
        ("How many eggs does a duck lay in a whole week of workers?", False),
        ("", False),
    ],
)
def test_held_out_prompts_are_known(text: str, is_held_out: bool) -> None:
    """An evaluation set would be trained on, or half of all prompts be lost."""
    held_out = HeldOut.from_prompts([user_turn(QUESTION), user_turn("name it!")])
    assert (user_turn(text) in held_out) is is_held_out
    follow_up = Prompt(messages=(*(user_turn("hi").messages or ()), *(user_turn(text).messages or ())))
    assert (follow_up in held_out) is is_held_out


def test_held_out_files_are_read(tmp_path: Path) -> None:
    """An evaluation set in the layout of another source would not be excluded."""
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"turns": [QUESTION]}), encoding="utf-8")
    assert Prompt(text=QUESTION) in HeldOut([path])
    assert user_turn("1 + 1 = ?") not in HeldOut([path])


def test_signs_alone_are_a_text() -> None:
    """All texts without letters would be the same."""
    assert normalize("+ -") != normalize("- +")


def test_base_models_get_the_beginning_of_a_text() -> None:
    """A base model would have nothing to continue, or get a question cut in half."""
    tokenizer = tiny_tokenizer(chat_template=None)
    assert for_base_model(Prompt(text="w7 w8 w9"), tokenizer, 2) == Prompt(text="w7 w8")
    assert for_base_model(Prompt(text="w7  w8"), tokenizer, 2) == Prompt(text="w7  w8")
    assert for_base_model(user_turn("w7 w8 w9"), tokenizer, 2) == Prompt(text="w7 w8 w9")


def test_datasets_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts on the hub could not be used, or would be asked in the wrong role."""
    datasets = pytest.importorskip("datasets")
    conversation = [{"role": "user", "content": "c"}]
    rows = {"prompt": ["a", "b"], "chat": [conversation, conversation], "number": [1, 2]}
    table = datasets.Dataset.from_dict(rows)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or table)
    assert read_dataset("org/name", subset="main", split="test") == [user_turn("a"), user_turn("b")]
    assert asked == [(("org/name", "main"), {"split": "test"})]
    assert read_dataset("org/name", is_chat=False)[0] == Prompt(text="a")
    assert read_dataset("org/name", column="chat")[0] == user_turn("c")
    with pytest.raises(ValueError, match=r"`column` must be one of \['prompt', 'chat', 'number'\], got 'question'"):
        read_dataset("org/name", column="question")
    with pytest.raises(ValueError, match="row 0 of `number`: a prompt must be one of"):
        read_dataset("org/name", column="number")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever lacks the extra would not know which."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "dspark-hf\[train\]"'):
        read_dataset("org/name")
