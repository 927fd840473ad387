"""Conversations become tokens of which the target's own words alone are learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from dspark_hf.data.collection import Collection, CollectionPlan, Collector
from dspark_hf.data.sources import ListedPrompts
from dspark_hf.data.writers import LocalWriter, Sampling
from dspark_hf.prompts import Prompt, encode_prompt, user_turn
from dspark_hf.training.conversations import (
    Conversation,
    encode,
    most_frequent_tokens,
    read_conversations,
    split_held_out,
)
from tests.tiny import tiny_target
from tests.training import tiny_tokenizer as tiny

WORDS = ["<unk>", "<user>", "<model>", "<end>", "a", "b", "c", "d", "e", "f"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", unk_token="<unk>")
    # decorates finished answers: the model's own words must not pass through it
    messages = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
    fast.chat_template = messages + "{% if add_generation_prompt %}<model> {% endif %}"
    return fast


def _words(conversation: Conversation) -> str:
    return " ".join(WORDS[token] for token in conversation.input_ids)


def test_only_the_answer_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    """The drafter would learn to write prompts, or not to stop."""
    conversation = encode("a b", "c d e", tokenizer, max_length=100)
    assert _words(conversation) == "<user> a b <model> c d e <end>"
    assert conversation.loss_mask.tolist() == [False] * 4 + [True] * 4


def test_long_conversations_are_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    """A long conversation would not fit in memory, or its mask would not fit its tokens."""
    conversation = encode("a b", "c d e", tokenizer, max_length=6)
    assert _words(conversation) == "<user> a b <model> c d"
    assert conversation.loss_mask.tolist() == [False] * 4 + [True] * 2


def test_reads_lines(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A file of conversations would lose some, or keep some that teach nothing."""
    path = tmp_path / "chats.jsonl"
    records = [{"user": "a", "assistant": "b c"}, {"user": "a b c d e f", "assistant": "a"}]
    path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    assert len(read_conversations(path, tokenizer)) == 2
    # of the second, no answer is left
    assert len(read_conversations(path, tokenizer, max_length=8)) == 1


def test_a_line_without_an_answer_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A file of another shape would fail without saying where."""
    path = tmp_path / "chats.jsonl"
    path.write_text('{"user": "a", "assistant": "b"}\n{"user": "a"}\n', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"must hold `user` and `assistant`, or .* on every line, got \['user'\] on line 2"
    ):
        read_conversations(path, tokenizer)


def _read(folder: Path, record: Any, *, chat_template: str | None = tiny.CHAT_TEMPLATE, **options: Any) -> list[str]:
    """Return conversations as text, the learnt words in brackets."""
    path = folder / "chats.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    return [
        " ".join(
            f"[{tiny.WORDS[token]}]" if is_own else tiny.WORDS[token]
            for token, is_own in zip(conversation.input_ids.tolist(), conversation.loss_mask.tolist(), strict=True)
        )
        for conversation in read_conversations(path, tiny.tiny_tokenizer(chat_template), **options)
    ]


def _messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)]


def test_an_answer_ends_as_the_template_ends_it(tmp_path: Path) -> None:
    """The drafter would learn an end that the target never writes, and none of its own."""
    assert _read(tmp_path, {"user": "w7", "assistant": "w8"}) == ["<bos> <user> w7 <end> <assistant> [w8] [<end>]"]


def test_a_cut_answer_has_no_end(tmp_path: Path) -> None:
    """The drafter would learn to stop where the length limit was."""
    expected = ["<bos> <user> w7 <end> <assistant> [w8] [w9]"]
    assert _read(tmp_path, {"user": "w7", "assistant": "w8 w9", "finished": False}) == expected
    record = {"prompt": _messages("w7"), "completion": _messages("", "w8 w9")[1:], "finished": False}
    assert _read(tmp_path, record) == expected
    cut = encode("w7", "w8 w9", tiny.tiny_tokenizer(), max_length=99, finished=False)
    assert tiny.WORDS[int(cut.input_ids[-1])] == "w9"


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({}, "[w8] [w9] [<end>]"),
        ({"completion_ids": [8, 10, 5]}, "[w8] [w10] [<end>]"),
        ({"completion_ids": [8, 10]}, "[w8] [w10]"),
        ({"completion_ids": [8, 10], "finished": False}, "[w8] [w10]"),
        # the server told the words only
        ({"completion_ids": [8, 10], "finished": True}, "[w8] [w10] [<end>]"),
        # another end of the target's own
        ({"completion_ids": [8, 10, 2], "finished": True}, "[w8] [w10] [<eos>]"),
    ],
)
def test_the_targets_own_tokens_are_learnt(fields: dict[str, Any], answer: str, tmp_path: Path) -> None:
    """The drafter would learn other tokens than the target wrote, or an end twice."""
    record = {"prompt": _messages("w7"), "completion": [{"role": "assistant", "content": "w8 w9"}], **fields}
    assert _read(tmp_path, record) == [f"<bos> <user> w7 <end> <assistant> {answer}"]


def test_texts_are_continued_without_a_template(tmp_path: Path) -> None:
    """A base model's drafter would learn behind a user turn that it never sees."""
    record = {"prompt": "w7", "completion": "w8"}
    assert _read(tmp_path, record, chat_template=None) == ["w7 [w8] [<eos>]"]
    assert _read(tmp_path, {**record, "prompt": ""}, chat_template=None) == ["<bos> [w8] [<eos>]"]
    assert _read(tmp_path, {"user": "w7", "assistant": "w8"}, chat_template=None) == ["w7 [w8] [<eos>]"]


def test_all_answers_of_a_conversation_are_learnt(tmp_path: Path) -> None:
    """Later answers would be lost, or the user's words be learnt."""
    record = {"messages": [*_messages("w7", "w8", "w9", "w10 w11"), {"role": "user", "content": "w12"}]}
    whole = "<bos> <user> w7 <end> <assistant> [w8] [<end>] <user> w9 <end> <assistant> [w10] [w11] [<end>]"
    assert _read(tmp_path, record) == [whole]
    assert _read(tmp_path, record, max_length=12) == [" ".join(whole.split()[:12])]


def test_what_a_template_writes_behind_an_answer_is_not_learnt(tmp_path: Path) -> None:
    """The drafter would learn the template's words for the target's."""
    template = tiny.CHAT_TEMPLATE.replace("<end> {% endfor %}", "<end> w63 {% endfor %}")
    record = {"messages": _messages("w7", "w8", "w9", "w10")}
    assert _read(tmp_path, record, chat_template=template) == [
        "<bos> <user> w7 <end> w63 <assistant> [w8] [<end>] w63 <user> w9 <end> w63 <assistant> [w10] [<end>] w63"
    ]


def test_answers_stand_alone_where_the_template_rewrites_them(tmp_path: Path) -> None:
    """The drafter would learn earlier answers without the thoughts that the target wrote."""
    template = (
        "<bos> {% for m in messages %}<{{ m['role'] }}> "
        "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split(' w63 ')[-1] }}{% endif %}"
        " <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    record = {"messages": _messages("w7", "w60 w63 w8", "w9", "w61 w63 w10")}
    assert _read(tmp_path, record, chat_template=template) == [
        "<bos> <user> w7 <end> <assistant> [w60] [w63] [w8] [<end>]",
        "<bos> <user> w7 <end> <assistant> w8 <end> <user> w9 <end> <assistant> [w61] [w63] [w10] [<end>]",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oh", "must hold one JSON object a line, got '{oh' on line 1"),
        ("[]", r"must hold `user` and `assistant`, or .* got \[\] on line 1"),
        ('{"prompt": 3, "completion": "a"}', "line 1: a prompt must be one of"),
        ('{"prompt": "a", "completion": []}', "line 1: `completion` must be a text or one assistant message"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    """A file of another source would fail without saying where."""
    path = tmp_path / "chats.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_conversations(path, tiny.tiny_tokenizer())


@pytest.mark.parametrize("chat_template", [None, tiny.CHAT_TEMPLATE], ids=["base", "chat"])
def test_what_is_collected_is_read_token_for_token(chat_template: str | None, tmp_path: Path) -> None:
    """The drafter would be trained on other tokens than the target wrote behind this prompt."""
    tokenizer, target = tiny.tiny_tokenizer(chat_template), tiny_target("llama")
    prompts = [user_turn(f"w{index}") if chat_template else Prompt(text=f"w{index}") for index in range(20, 40)]
    path = tmp_path / "chats.jsonl"
    plan = CollectionPlan(samplings=[Sampling(1.0)], max_new_tokens=30)
    with Collection(path, "tiny") as collection:
        writer = LocalWriter(target, tokenizer)
        Collector(collection, ListedPrompts(prompts, "list"), writer, plan, shows_progress=False).run()
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {record["finished"] for record in records} == {True, False}
    written = {tuple(encode_prompt(prompt, tokenizer).tolist()) for prompt in prompts}
    records = [record for record in records if len(record["completion_ids"]) > 1]
    conversations = read_conversations(path, tokenizer)
    for record, conversation in zip(records, conversations, strict=True):
        own = conversation.loss_mask
        assert conversation.input_ids[own].tolist() == record["completion_ids"]
        assert tuple(conversation.input_ids[~own].tolist()) in written


def test_most_frequent_tokens_of_the_answers() -> None:
    """A reduced vocabulary would be chosen by the prompts' words, or would change from run to run."""
    mask = torch.tensor([False, False, True, True, True])
    conversations = [
        Conversation(torch.tensor([9, 9, 5, 5, 7]), mask),
        Conversation(torch.tensor([9, 9, 7, 5, 8]), mask),
    ]
    assert most_frequent_tokens(conversations, 2, vocab_size=10).tolist() == [5, 7]
    # ties and the rest: lower ids first
    assert most_frequent_tokens(conversations, 5, vocab_size=10).tolist() == [0, 1, 5, 7, 8]


@pytest.mark.parametrize(("total", "count"), [(10, 3), (3, 3), (5, 0), (7, 2)])
def test_held_out_is_never_trained_on(total: int, count: int) -> None:
    """The evaluation would measure memory, or conversations would be lost."""
    conversations = [Conversation(torch.tensor([index]), torch.tensor([True])) for index in range(total)]
    kept, held_out = split_held_out(conversations, count)
    assert len(held_out) == count
    numbers = [int(conversation.input_ids) for conversation in [*kept, *held_out]]
    assert sorted(numbers) == list(range(total))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"user": "caf\xe9", "assistant": "b"}', "must be UTF-8, got the byte 0xe9 on line 2"),
        (b'{"a": ' + b"[" * 100_000, r"must hold one JSON object a line, got .* on line 2 \(too deep\)"),
        (b'{"messages": 3}', "line 2: `messages` must be a list of objects with a `role`, got 3"),
        (b'{"messages": [3]}', r"line 2: `messages` must be a list of objects with a `role`, got \[3\]"),
        (b'{"user": 3, "assistant": "b"}', "line 2: `user` must be a text, got 3"),
        (b'{"user": "a", "assistant": "\\ud800"}', "line 2: `assistant` must be a text"),
        (b'{"prompt": "a", "completion": [3]}', "line 2: `completion` must be a text or one assistant message"),
        (
            b'{"prompt": "a", "completion": "b", "completion_ids": "x"}',
            "line 2: `completion_ids` must be token ids in",
        ),
        (b'{"prompt": "a", "completion": "b", "completion_ids": 7}', "line 2: `completion_ids` must be token ids in"),
        (
            b'{"prompt": "a", "completion": "b", "completion_ids": [9, 10]}',
            r"must be token ids in \[0, 9\], got \[9, 10\]",
        ),
        (b'{"prompt": "a", "completion": "b", "completion_ids": [1.5, 2]}', "line 2: `completion_ids` must be token"),
        (b'{"prompt": "a", "completion": "b", "completion_ids": [true]}', "line 2: `completion_ids` must be token"),
        (b'{"prompt": "a", "completion": "b", "finished": "no"}', "line 2: `finished` must be true or false"),
    ],
)
def test_a_bad_line_is_named(line: bytes, message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """One bad line in a million ends in a stack of calls, or breaks training in an embedding hours later."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"user": "a b", "assistant": "c d"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message) as failure:
        read_conversations(path, tokenizer, vocab_size=len(WORDS))
    assert str(path) in str(failure.value)


def test_a_template_that_refuses_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Roles that a chat template does not know end in a stack of calls of its own."""
    start = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    tokenizer.chat_template = start + str(tokenizer.chat_template)
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    with pytest.raises(ValueError, match=r"(?s)line 1: messages must be such .* got the roles .*must alternate"):
        read_conversations(path, tokenizer)


def test_conversations_that_are_all_cut_away_are_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A full file is said to be empty, and nobody thinks of the longest length."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"user": "a b c d", "assistant": "c d"}) + "\n")
    with pytest.raises(ValueError, match=r"got 1 conversations, of which none has. Raise `max_length` \(3\)"):
        read_conversations(path, tokenizer, max_length=3)
