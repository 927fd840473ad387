"""Conversations become tokens of which the target's own words alone are learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from dspark_hf.training.data import (
    Conversation,
    encode,
    most_frequent_tokens,
    read_conversations,
    split_held_out,
)

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
    with pytest.raises(ValueError, match=r"must hold `user` and `assistant` on every line, got \['user'\] on line 2"):
        read_conversations(path, tokenizer)


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
