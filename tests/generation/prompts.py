"""Prompts for tiny targets."""

from __future__ import annotations

import torch
from torch import Tensor

LENGTHS = (11, 3, 17, 6)


def ragged_prompts(
    num_rows: int, *, vocab_size: int = 64, lengths: tuple[int, ...] = LENGTHS, seed: int = 0
) -> dict[str, Tensor]:
    """Return `num_rows` left-padded random prompts of different lengths, with their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths[:num_rows])
    input_ids = torch.randint(2, vocab_size, (num_rows, width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths[:num_rows])[:, None]
    return {"input_ids": input_ids.where(mask, 0), "attention_mask": mask.long()}


def num_padded(inputs: dict[str, Tensor]) -> list[int]:
    """Return every row's number of padding tokens."""
    return (1 - inputs["attention_mask"]).sum(-1).tolist()
