"""Training conversations: JSON Lines on disk, token ids and loss masks in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Conversation:
    """One tokenised conversation: `input_ids` `(T,)` and `loss_mask` `(T,)`, True on the target's own words."""

    input_ids: Tensor
    loss_mask: Tensor


def read_conversations(path: str | Path, tokenizer: Any, *, max_length: int = 1024) -> list[Conversation]:
    """Return the conversations of a JSON Lines file, each line `{"user": ..., "assistant": ...}`.

    Args:
        path: the file.
        tokenizer: the target's tokenizer, with its chat template.
        max_length: longest conversation kept, in tokens; longer ones are cut.

    Raises:
        ValueError: if a line lacks a field; the message names the line.
    """
    conversations = []
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = json.loads(line)
            if "user" not in record or "assistant" not in record:
                raise ValueError(
                    f"`{path}` must hold `user` and `assistant` on every line, got {sorted(record)} on line {number}. "
                    "Write one JSON object a line with both fields."
                )
            conversations.append(encode(record["user"], record["assistant"], tokenizer, max_length=max_length))
    return [conversation for conversation in conversations if int(conversation.loss_mask.sum()) > 1]


def encode(user: str, assistant: str, tokenizer: Any, *, max_length: int) -> Conversation:
    """Return one conversation through the tokenizer's chat template, cut to `max_length` tokens."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    # the answer alone: a template may trim or decorate a finished turn, the model's own words stay as they were
    answer_ids = [*tokenizer(assistant, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    input_ids = torch.tensor([*prompt_ids, *answer_ids][:max_length])
    loss_mask = torch.arange(len(input_ids)) >= len(prompt_ids)
    return Conversation(input_ids, loss_mask)


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
