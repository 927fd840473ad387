"""Training conversations: JSON Lines on disk, token ids and loss masks in memory.

Legend: T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from dspark_hf.damage import is_text, parse_line, read_lines
from dspark_hf.prompts import (
    Prompt,
    apply_template,
    encode_prompt,
    end_token_id,
    parse_prompt,
    special_token_ids,
    user_turn,
)

# more than any vocabulary has
_MOST_TOKENS = 1 << 31
_LAYOUTS = "`user` and `assistant`, or `prompt` and `completion`, or `messages`,"


@dataclass
class Conversation:
    """One tokenised conversation: `input_ids` `(T,)` and `loss_mask` `(T,)`, True on the target's own words."""

    input_ids: Tensor
    loss_mask: Tensor


def read_conversations(
    path: str | Path, tokenizer: Any, *, max_length: int = 1024, vocab_size: int | None = None
) -> list[Conversation]:
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
        vocab_size: the target's, which `completion_ids` must lie in.

    Raises:
        ValueError: if a line has another layout, or no conversation is left; the message names the line.
    """
    reader, path = _Reader(tokenizer, max_length, vocab_size), Path(path)
    conversations = []
    for number, line in read_lines(path):
        conversations += _read_line(line, reader, path, number)
    kept = [conversation for conversation in conversations if int(conversation.loss_mask.sum()) > 1]
    if conversations and not kept:
        raise ValueError(
            f"`{path}` must hold answers of which at least two tokens lie within `max_length`, got "
            f"{len(conversations)} conversations, of which none has. Raise `max_length` ({max_length}), or give "
            "longer answers."
        )
    return kept


def _read_line(line: str, reader: _Reader, path: Path, number: int) -> list[Conversation]:
    record = parse_line(path, number, line, "Correct or remove the line.")
    fields = sorted(record) if isinstance(record, Mapping) else record
    if not isinstance(record, Mapping) or not _is_conversation(record):
        raise ValueError(
            f"`{path}` must hold {_LAYOUTS} on every line, got {fields!r:.80} on line {number}. Write one JSON object "
            "a line with these fields."
        )
    try:
        return reader.read(record)
    except ValueError as error:
        raise ValueError(f"`{path}`, line {number}: {error}") from error


def _is_conversation(record: Mapping[str, Any]) -> bool:
    return any(names <= record.keys() for names in ({"messages"}, {"prompt", "completion"}, {"user", "assistant"}))


class _Reader:
    def __init__(self, tokenizer: Any, max_length: int, vocab_size: int | None = None):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._vocab_size = vocab_size
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
        is_finished = record.get("finished")
        if is_finished is None:
            is_finished = token_ids is None
        if not isinstance(is_finished, bool):
            raise ValueError(f"`finished` must be true or false, got {is_finished!r:.60}. Correct or remove it.")
        if token_ids is None:
            token_ids = self._ids(_answer_text(record))
        self._check_ids(token_ids)
        has_end = token_ids and token_ids[-1] in self._special_ids
        end_ids = [self._end_id] if is_finished and not has_end and self._end_id is not None else []
        return [*token_ids, *end_ids]

    def _check_ids(self, token_ids: Any) -> None:
        most = _MOST_TOKENS if self._vocab_size is None else self._vocab_size
        # a truth value is no number
        if not isinstance(token_ids, list) or not all(type(one) is int and 0 <= one < most for one in token_ids):
            raise ValueError(
                f"`completion_ids` must be token ids in [0, {most - 1}], got {token_ids!r:.60}. Remove the field: the "
                "text is read instead."
            )

    def _read_messages(self, messages: Any) -> list[Conversation]:
        if not isinstance(messages, list) or not all(_has_role(message) for message in messages):
            raise ValueError(f"`messages` must be a list of objects with a `role`, got {messages!r:.60}. Correct it.")
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
        text = apply_template(self._tokenizer, messages, opens_answer=opens_answer)
        if not is_text(text):
            raise ValueError("`messages` must hold whole characters, got half of one. Remove the escape.")
        return text

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids


def _has_role(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)


def _prompt(record: Mapping[str, Any]) -> Prompt:
    if "completion" not in record:
        return user_turn(_text(record, "user"))
    # an empty text is where a base model started from nothing
    return Prompt(text="") if record["prompt"] == "" else parse_prompt({"prompt": record["prompt"]})


def _answer_text(record: Mapping[str, Any]) -> str:
    if "completion" not in record:
        return _text(record, "assistant")
    completion = record["completion"]
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], Mapping):
        completion = completion[0].get("content")
    if is_text(completion):
        return completion
    raise ValueError(
        f"`completion` must be a text or one assistant message, got {str(completion)[:80]}. Write longer "
        "conversations as `messages`."
    )


def _text(record: Mapping[str, Any], name: str) -> str:
    if not is_text(record[name]):
        raise ValueError(f"`{name}` must be a text, got {record[name]!r:.60}. Correct it.")
    return record[name]


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
