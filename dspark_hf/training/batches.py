"""Conversations as batches of padded tensors.

B sequences, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from dspark_hf.training.conversations import Conversation


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
