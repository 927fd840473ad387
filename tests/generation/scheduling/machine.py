"""A machine and a drafter that are simulated: what rounds take, and which drafts are accepted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dspark_hf.generation.scheduling import Batch, RoundOutcome, Schedule
from tests.generation.scheduling.fakes import block_of

LARGEST_MARGIN = 6.0


@dataclass
class Machine:
    """Steps that cost what a formula says, times a mood, with some noise, and more at the first time.

    The share `disturbed` of the rounds takes three times as long.
    """

    verify_base: float = 0.02
    token_slope: float = 0.002
    draft_base: float = 0.004
    draft_slope: float = 0.001
    mood: float = 1.0
    noise: float = 0.0
    start_up: float = 0.0
    disturbed: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    seen: set[tuple[int, int, int]] = field(default_factory=set)

    def verify_seconds(self, rows: int, width: int, context_length: int = 0) -> float:
        return self.mood * (self.verify_base + self.token_slope * rows * width)

    def draft_seconds(self, rows: int, num_drafts: int, context_length: int = 0) -> float:
        return self.mood * (self.draft_base + self.draft_slope * num_drafts)

    def outcome(
        self, batch: Batch, num_drafts: int, num_verified: list[int], num_accepted: list[int], *, reading: float = 0.0
    ) -> RoundOutcome:
        """Return the round's outcome; `reading` are seconds of catching up on what the drafter had not read."""
        rows, width = batch.num_rows, 1 + max(num_verified)
        shape = (rows, num_drafts, width)
        extra = 0.0 if shape in self.seen else self.start_up
        self.seen.add(shape)
        shake = 1 + self.noise * self.draw.uniform(-1, 1)
        if self.disturbed and self.draw.random() < self.disturbed:
            shake *= 3
        drafting = self.draft_seconds(rows, num_drafts) * shake + reading if num_drafts else 0.0
        verifying = self.verify_seconds(rows, width) * shake + extra
        return RoundOutcome(batch, num_drafts, num_verified, num_accepted, drafting, verifying, is_typical=not reading)


@dataclass
class Text:
    """What was written, and in which time."""

    num_tokens: int = 0
    seconds: float = 0.0
    # by round
    num_drafted: list[int] = field(default_factory=list)
    num_verified: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds

    def share_drafted(self, start: int = 0) -> float:
        """Return the share of the rounds from `start` on that drafted."""
        rounds = self.num_drafted[start:]
        return sum(count > 0 for count in rounds) / len(rounds)


def write(
    schedule: Schedule,
    machine: Machine,
    chance: Callable[[float], float],
    num_rounds: int,
    *,
    num_rows: int = 1,
    max_drafts: int = 5,
    seed: int = 0,
) -> Text:
    """Return what a schedule makes of a drafter whose drafts of a margin are accepted with `chance(margin)`."""
    draw = random.Random(seed)
    text = Text()
    for number in range(num_rounds):
        batch = Batch((max_drafts,) * num_rows, num_rows, 10 + number)
        num_drafts = schedule.num_drafts(batch)
        assert 0 <= num_drafts <= max_drafts
        num_verified, num_accepted = [0] * num_rows, [0] * num_rows
        if num_drafts:
            margins = [[draw.uniform(0, LARGEST_MARGIN) for _ in range(num_drafts)] for _ in range(num_rows)]
            num_verified = schedule.admit(block_of(torch.zeros(num_rows, num_drafts), torch.tensor(margins)), batch)
            for row, verified in enumerate(num_verified):
                while num_accepted[row] < verified and draw.random() < chance(margins[row][num_accepted[row]]):
                    num_accepted[row] += 1
        outcome = machine.outcome(batch, num_drafts, num_verified, num_accepted)
        schedule.observe(outcome)
        text.num_tokens += num_rows + sum(num_accepted)
        text.seconds += outcome.draft_seconds + outcome.other_seconds
        text.num_drafted.append(num_drafts)
        text.num_verified.append(max(num_verified))
    return text
