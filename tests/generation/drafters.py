"""Drafters with a script: right, wrong, or right with a given probability; and one that draws from a given law."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dspark_hf.generation.drafting.interface import DraftContext, DraftedBlock, Drafter, Sampler
from dspark_hf.generation.targets.adapter import TargetAdapter

BLOCK_SIZE = 5


class ScriptedDrafter(Drafter):
    """Propose the tokens of `script`, each with probability `accuracy`, another token otherwise.

    `script` `(B, length)` holds every row's whole text, left padding included; `num_padded` says how much of it.
    """

    # tests count passes and drafts: every draft is its own, and verified, unless a call says otherwise
    scheduler = "fixed"
    drafts = "model"

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

    def append_rows(self, other: _ScriptedContext) -> None:
        self.rows = self.rows + other.rows


# (slot k, the tokens before it [B]) -> what is said of the slot: logits [B, V] or confidence [B]
SlotLaw = Callable[[int, Tensor], Tensor]


class MemorylessDrafter(Drafter):
    """Draft from `logits_after(slot, previous tokens)`, whatever stood before, with such a confidence if any."""

    drafts = "model"

    def __init__(
        self, logits_after: SlotLaw, vocab_size: int, block_size: int, *, confidence_after: SlotLaw | None = None
    ):
        self.config = PretrainedConfig(vocab_size=vocab_size)
        self.logits_after = logits_after
        self.confidence_after = confidence_after
        self._block_size = block_size

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def target_layer_ids(self) -> list[int]:
        return [0]

    def check_target(self, target: TargetAdapter) -> None:
        """Any target will do."""

    def start(self, target: TargetAdapter, batch_size: int) -> DraftContext:
        return _NoContext(self)


class _NoContext(DraftContext):
    def __init__(self, drafter: MemorylessDrafter):
        self.drafter = drafter

    def extend(self, hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int]) -> None:
        """Nothing is remembered."""

    def draft(self, anchor_ids: Tensor, positions: Tensor, num_drafts: int, sampler: Sampler) -> DraftedBlock:
        token_ids, probs, confidence = anchor_ids[:, None], [], []
        for slot in range(num_drafts):
            previous = token_ids[:, -1]
            next_ids, next_probs = sampler(slot, self.drafter.logits_after(slot, previous), token_ids[:, 1:])
            token_ids = torch.cat([token_ids, next_ids[:, None]], dim=1)
            probs.append(next_probs)
            if self.drafter.confidence_after is not None:
                confidence.append(self.drafter.confidence_after(slot, previous))
        return DraftedBlock(
            token_ids[:, 1:],
            None if probs[0] is None else torch.stack(probs, dim=1),
            torch.stack(confidence, dim=1) if confidence else None,
        )

    def select_rows(self, rows: Tensor) -> None:
        """Nothing is remembered."""


class ScriptedTreeDrafter(ScriptedDrafter):
    """Draft random trees: a child goes on by the script with probability `accuracy`, another way otherwise."""

    def start(self, target: TargetAdapter, batch_size: int) -> DraftContext:
        return _ScriptedTreeContext(self, target.vocab_size, batch_size)


class _ScriptedTreeContext(_ScriptedContext):
    @property
    def drafts_trees(self) -> bool:
        return True

    def draft_tree(self, anchor_ids: Tensor, positions: Tensor, num_slots: int, num_drafts: int) -> DraftedBlock:
        generator, place = self.drafter.generator, int(positions)
        tokens, parents, depths = [int(anchor_ids)], [-1], [0]
        while len(tokens) <= num_drafts:
            # mostly a late one, so that trees are deep
            parent = max(int(torch.randint(len(tokens), (), generator=generator)) for _ in range(2))
            if depths[parent] == num_slots:
                parent = 0
            taken = {token for token, other in zip(tokens, parents, strict=True) if other == parent}
            token = self._token(0, place + depths[parent] + 1)
            while token in taken:
                token = (token + 1) % self.vocab_size
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
        self.drafter.widths.append(num_drafts)
        return DraftedBlock(torch.tensor([tokens[1:]]), None, None, parents=torch.tensor(parents))
