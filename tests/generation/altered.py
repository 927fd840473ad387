"""A drafter whose blocks are altered before the decoding loop sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dspark_hf.generation.drafting.interface import DraftContext, DraftedBlock, Drafter, Sampler
from dspark_hf.generation.targets.adapter import TargetAdapter


class AlteredDrafter(Drafter):
    """Draft as `drafter` does and pass every block through `alter`."""

    def __init__(self, drafter: Drafter, alter: Callable[[DraftedBlock], DraftedBlock]):
        self.config = drafter.config
        self.drafter = drafter
        self.alter = alter
        self.scheduler, self.drafts = drafter.scheduler, drafter.drafts

    @property
    def block_size(self) -> int:
        return self.drafter.block_size

    @property
    def target_layer_ids(self) -> list[int]:
        return self.drafter.target_layer_ids

    def check_target(self, target: TargetAdapter) -> None:
        self.drafter.check_target(target)

    def start(self, target: TargetAdapter, batch_size: int) -> DraftContext:
        return _AlteredContext(self.drafter.start(target, batch_size), self.alter)


class _AlteredContext(DraftContext):
    def __init__(self, context: DraftContext, alter: Callable[[DraftedBlock], DraftedBlock]):
        self.context = context
        self.alter = alter

    def extend(self, hidden_states: Tensor, positions: Tensor, num_tokens: Sequence[int]) -> None:
        self.context.extend(hidden_states, positions, num_tokens)

    def draft(self, anchor_ids: Tensor, positions: Tensor, num_drafts: int, sampler: Sampler) -> DraftedBlock:
        return self.alter(self.context.draft(anchor_ids, positions, num_drafts, sampler))

    def select_rows(self, rows: Tensor) -> None:
        self.context.select_rows(rows)
