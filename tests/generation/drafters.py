"""Drafters with a script: right, wrong, or right with a given probability."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dspark_hf.generation.drafting import DraftContext, DraftedBlock, Drafter, Sampler
from dspark_hf.generation.target import TargetAdapter

BLOCK_SIZE = 5


class ScriptedDrafter(Drafter):
    """Propose the tokens of `script`, each with probability `accuracy`, another token otherwise.

    `script` `(B, length)` holds every row's whole text, left padding included; `num_padded` says how much of it.
    """

    # tests count passes: every draft is verified unless a call says otherwise
    scheduler = "fixed"

    def __init__(self, target: PreTrainedModel, script: Tensor, num_padded: Sequence[int], accuracy: float):
        self.config = PretrainedConfig(vocab_size=target.config.get_text_config().vocab_size)
        self.script = script
        self.num_padded = list(num_padded)
        self.accuracy = accuracy
        self.widths: list[int] = []
        self.generator = torch.Generator().manual_seed(0)

    @property
    def block_size(self) -> int:
        return BLOCK_SIZE

    @property
    def target_layer_ids(self) -> list[int]:
        return [0]

    def check_target(self, target: TargetAdapter) -> None:
        """Any target will do."""

    def start(self, target: TargetAdapter, batch_size: int) -> DraftContext:
        return _ScriptedContext(self, target.vocab_size, batch_size)


class _ScriptedContext(DraftContext):
    def __init__(self, drafter: ScriptedDrafter, vocab_size: int, batch_size: int):
        self.drafter = drafter
        self.vocab_size = vocab_size
        self.rows = list(range(batch_size))

    def extend(self, hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int]) -> None:
        """A script needs no context."""

    def draft(self, anchor_ids: Tensor, positions: Tensor, num_drafts: int, sampler: Sampler) -> DraftedBlock:
        drafted, probs = anchor_ids.new_empty(len(self.rows), 0), []
        for slot in range(num_drafts):
            places = zip(self.rows, positions.tolist(), strict=True)
            wanted = torch.tensor([self._token(row, position + 1 + slot) for row, position in places])
            logits = torch.nn.functional.one_hot(wanted, self.vocab_size) * 20.0
            token_ids, slot_probs = sampler(slot, logits, drafted)
            drafted = torch.cat([drafted, token_ids[:, None]], dim=1)
            probs.append(slot_probs)
        stacked = None if probs[0] is None else torch.stack(probs, dim=1)
        self.drafter.widths.append(num_drafts)
        return DraftedBlock(drafted, stacked, None)

    def _token(self, row: int, position: int) -> int:
        column = min(position + self.drafter.num_padded[row], self.drafter.script.shape[1] - 1)
        token = int(self.drafter.script[row, column])
        is_right = torch.rand((), generator=self.drafter.generator) < self.drafter.accuracy
        return token if is_right else (token + 1) % self.vocab_size

    def select_rows(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]
