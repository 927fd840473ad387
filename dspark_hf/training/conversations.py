"""Training conversations: JSON Lines on disk, token ids and loss masks in memory.

Legend: T tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from dspark_hf.prompts import Prompt, encode_prompt, end_token_id, parse_prompt, special_token_ids, user_turn

_LAYOUTS = "`user` and `assistant`, or `prompt` and `completion`, or `messages`,"


@dataclass
class Conversation:
    """One tokenised conversation: `input_ids` `(T,)` and `loss_mask` `(T,)`, True on the target's own words."""

    input_ids: Tensor
    loss_mask: Tensor


def read_conversations(path: str | Path, tokenizer: Any, *, max_length: int = 1024) -> list[Conversation]:
    """Return the conversations of a JSON Lines file; those of whose answer hardly a token is left are dropped.

    A line is in one of these layouts:

    - `{"prompt": ..., "completion": ...}`, texts or lists of messages, as `dspark-hf data` and TRL write them. The
      answer's own tokens are taken from `completion_ids` where they are there; text read anew may become others;
    - `{"user": "...", "assistant": "..."}`;
    - `{"messages": [...]}`, of which every assistant turn is learnt.

    An answer ends with the token that ends a turn, unless the line says `"finished": false`: it was cut, and what
    came next is not known.

    Args:
        path: the file.
        tokenizer: the target's tokenizer, with its chat template.
        max_length: longest conversation kept, in tokens; longer ones are cut.

    Raises:
        ValueError: if a line has another layout; the message names the line.
    """
    reader = _Reader(tokenizer, max_length)
    conversations = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                conversations += _read_line(line, reader, f"`{path}`, line {number}", path, number)
    return [conversation for conversation in conversations if int(conversation.loss_mask.sum()) > 1]


def _read_line(line: str, reader: _Reader, place: str, path: str | Path, number: int) -> list[Conversation]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`{path}` must hold one JSON object a line, got {line.strip()[:60]!r} on line {number} ({error.msg}). "
            "Correct or remove the line."
        ) from error
    fields = sorted(record) if isinstance(record, Mapping) else record
    if not isinstance(record, Mapping) or not _is_conversation(record):
        raise ValueError(
            f"`{path}` must hold {_LAYOUTS} on every line, got {fields} on line {number}. Write one JSON object a "
            "line with these fields."
        )
    try:
        return reader.read(record)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _is_conversation(record: Mapping[str, Any]) -> bool:
    return any(names <= record.keys() for names in ({"messages"}, {"prompt", "completion"}, {"user", "assistant"}))


class _Reader:
    def __init__(self, tokenizer: Any, max_length: int):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._end_id = end_token_id(tokenizer)
        self._special_ids = special_token_ids(tokenizer)

    def read(self, record: Mapping[str, Any]) -> list[Conversation]:
        if "messages" in record:
            return self._read_messages(record["messages"])
        prompt_ids = encode_prompt(_prompt(record), self._tokenizer).tolist()
        return [self._join([(prompt_ids, False), (self._answer_ids(record), True)])]

    def _answer_ids(self, record: Mapping[str, Any]) -> list[int]:
        # a record that does not say how it ended: what the target wrote, if its tokens are there, else a whole answer
        token_ids = record.get("completion_ids")
        is_finished = record.get("finished", token_ids is None)
        if token_ids is None:
            token_ids = self._ids(_answer_text(record))
        has_end = token_ids and token_ids[-1] in self._special_ids
        end_ids = [self._end_id] if is_finished and not has_end and self._end_id is not None else []
        return [*token_ids, *end_ids]

    def _read_messages(self, messages: Any) -> list[Conversation]:
        turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        prefixes = [self._render(messages[:turn], opens_answer=True) for turn in turns]
        wholes = [self._render(messages[: turn + 1]) for turn in turns]
        if not all(whole.startswith(prefix) for prefix, whole in zip(prefixes, wholes, strict=True)):
            raise ValueError(
                "`messages` must be answers that follow the template's opening of an answer, got a template that "
                "writes them otherwise. Use `prompt` and `completion`."
            )
        # a template may rewrite earlier turns, such as thoughts it drops: then each answer stands for itself
        is_one = all(later.startswith(whole) for whole, later in zip(wholes, prefixes[1:], strict=False))
        pairs = list(zip(prefixes, wholes, strict=True))
        return [self._encode_turns(group) for group in ([pairs] if is_one else [[pair] for pair in pairs])]

    def _encode_turns(self, turns: Sequence[tuple[str, str]]) -> Conversation:
        segments, done = [], ""
        for prefix, whole in turns:
            answer_ids = self._ids(whole[len(prefix) :])
            # what the template writes behind the end of the turn is not the target's
            ends = [index for index, token_id in enumerate(answer_ids) if token_id == self._end_id]
            length = ends[0] + 1 if ends else len(answer_ids)
            segments += [
                (self._ids(prefix[len(done) :]), False),
                (answer_ids[:length], True),
                (answer_ids[length:], False),
            ]
            done = whole
        return self._join(segments)

    def _join(self, segments: Iterable[tuple[list[int], bool]]) -> Conversation:
        pairs = [(token_id, is_own) for token_ids, is_own in segments for token_id in token_ids][: self._max_length]
        return Conversation(
            torch.tensor([token_id for token_id, _ in pairs], dtype=torch.long),
            torch.tensor([is_own for _, is_own in pairs], dtype=torch.bool),
        )

    def _render(self, messages: Any, *, opens_answer: bool = False) -> str:
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=opens_answer, tokenize=False)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids


def _prompt(record: Mapping[str, Any]) -> Prompt:
    if "completion" not in record:
        return user_turn(record["user"])
    # an empty text is where a base model started from nothing
    return Prompt(text="") if record["prompt"] == "" else parse_prompt({"prompt": record["prompt"]})


def _answer_text(record: Mapping[str, Any]) -> str:
    if "completion" not in record:
        return record["assistant"]
    completion = record["completion"]
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0].get("content"), str):
        return completion[0]["content"]
    raise ValueError(
        f"`completion` must be a text or one assistant message, got {str(completion)[:80]}. Write longer "
        "conversations as `messages`."
    )


def encode(user: str, assistant: str, tokenizer: Any, *, max_length: int, finished: bool = True) -> Conversation:
    """Return one conversation through the tokenizer's chat template, cut to `max_length` tokens.

    Args:
        user: the user turn.
        assistant: the answer.
        tokenizer: the target's tokenizer.
        max_length: longest conversation, in tokens.
        finished: whether the answer ended by itself; one that was cut gets no token that ends it.
    """
    record = {"user": user, "assistant": assistant, "finished": finished}
    return _Reader(tokenizer, max_length).read(record)[0]


def most_frequent_tokens(conversations: Iterable[Conversation], count: int, vocab_size: int) -> Tensor:
    """Return the `count` tokens the target writes most often, ascending; ties and the rest go to lower ids."""
    seen: Counter[int] = Counter()
    for conversation in conversations:
        seen.update(conversation.input_ids[conversation.loss_mask].tolist())
    ranked = sorted(range(vocab_size), key=lambda token: (-seen[token], token))
    return torch.tensor(sorted(ranked[:count]))


def split_held_out(conversations: Sequence[Conversation], count: int) -> tuple[list[Conversation], list[Conversation]]:
    """Return training and held-out conversations; every n-th one is held out, so that both have the same mixture."""
    stride = max(len(conversations) // max(count, 1), 1)
    held_out = list(conversations[::stride])[:count]
    kept = [
        conversation for index, conversation in enumerate(conversations) if index % stride or index // stride >= count
    ]
    return kept, held_out


class ConversationDataset(Dataset):
    """Conversations by number, each as `{"index", "input_ids", "loss_mask"}`."""

    def __init__(self, conversations: Sequence[Conversation]):
        self.conversations = list(conversations)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        conversation = self.conversations[index]
        return {
            "index": torch.tensor(index),
            "input_ids": conversation.input_ids,
            "loss_mask": conversation.loss_mask,
        }


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return `index` `(B)`, `lengths` `(B)`, and `input_ids` and `loss_mask` `(B, T)`, padded on the right.

    A causal target needs no mask for that: no token sees the padding behind it.
    """
    return {
        "index": torch.stack([item["index"] for item in items]),
        "lengths": torch.tensor([len(item["input_ids"]) for item in items]),
        "input_ids": pad_sequence([item["input_ids"] for item in items], batch_first=True),
        "loss_mask": pad_sequence([item["loss_mask"] for item in items], batch_first=True),
    }
