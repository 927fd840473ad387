"""What one call of `generate` measured about its speculation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor


@dataclass(frozen=True)
class Round:
    """One verify pass, before stop rules cut its tokens: what was believed of the drafts, and what came of them.

    `rows` are the batch's rows that took part, b of them; `num_drafted` is the number of the drafter's drafts of each
    of them, K; `num_verified` and `num_accepted` hold one count a row, and so does `num_looked_up`: how many drafts a
    row looked up instead. It is empty where none did.
    `confidence` `(b, K)`, fp32, is on the drafter's device, after calibration if the drafter has any; None without a
    confidence head, or without drafts.
    """

    rows: tuple[int, ...]
    num_drafted: int
    confidence: Tensor | None
    num_verified: tuple[int, ...]
    num_accepted: tuple[int, ...]
    num_looked_up: tuple[int, ...] = ()


@dataclass
class RoundInProgress:
    """What has become of a round so far; the fields are those of a `Round`, one count a row."""

    num_drafted: int = 0
    confidence: Tensor | None = None
    num_verified: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)
    num_looked_up: tuple[int, ...] = ()

    def drafts_of(self, row: int) -> tuple[str, int]:
        """Return who made the drafts of the batch's row, and how many."""
        looked_up = self.num_looked_up[row] if self.num_looked_up else 0
        return ("lookup", looked_up) if looked_up else ("model", self.num_drafted)


@dataclass
class SourceCounts:
    """Drafts of one source: how many were made, how many the target checked, how many became output."""

    num_drafted: int = 0
    num_verified: int = 0
    num_accepted: int = 0


@dataclass
class SpeculationStatistics:
    """Count rounds and drafts of one call of `generate`, over all rows.

    A round of a row is one verify pass that the row took part in; the prefill is none.

    Attributes:
        num_target_passes: forward passes of the target, the prefill included; a pass serves all rows.
        num_rounds: verify passes, summed over rows.
        num_drafted: tokens that were proposed.
        num_verified: drafts the target checked, after the scheduler's cut.
        num_accepted: drafts that became output.
        num_committed: tokens of the rounds' output: accepted drafts and the target's own, up to each row's end. The
            prefill's token is not among them.
        by_source: the last three, of the drafter's drafts under `"model"`, of those looked up under `"lookup"`.
        verified_by_position: number of rounds whose prefix was accepted up to position k and that verified draft k.
        accepted_by_position: number of rounds in which draft k was accepted.
        draft_seconds: time in the drafter.
        verify_seconds: time in the target, the prefill left out.
        prefill_seconds: time in the prefill.
        other_seconds: the rest of the rounds: sampling, bookkeeping, criteria, streaming.
        origins: per row, for every generated token, whether it was a draft.
        rounds: every verify pass, in order.
    """

    num_target_passes: int = 0
    num_rounds: int = 0
    num_drafted: int = 0
    num_verified: int = 0
    num_accepted: int = 0
    num_committed: int = 0
    by_source: dict[str, SourceCounts] = field(
        default_factory=lambda: {"model": SourceCounts(), "lookup": SourceCounts()}
    )
    verified_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    prefill_seconds: float = 0.0
    other_seconds: float = 0.0
    origins: list[list[bool]] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list, repr=False)

    @property
    def tau(self) -> float:
        """Accepted length, tokens per round, the bonus token included (the paper's tau)."""
        return self.num_committed / max(self.num_rounds, 1)

    @property
    def mean_accepted(self) -> float:
        """Accepted drafts, tokens per round, without the bonus token (Transformers' `n_matches`)."""
        return self.num_accepted / max(self.num_rounds, 1)

    @property
    def accept_rate_by_position(self) -> list[float]:
        """Share of verified drafts accepted at each position, given that the prefix was."""
        pairs = zip(self.accepted_by_position, self.verified_by_position, strict=True)
        return [accepted / max(verified, 1) for accepted, verified in pairs]

    def start_rows(self, num_rows: int) -> None:
        """Make room for the rows' origins."""
        self.origins = [[] for _ in range(num_rows)]

    def add_round(
        self, num_drafted: int, num_verified: int, num_accepted: int, num_committed: int, source: str = "model"
    ) -> None:
        """Count one row's round; `num_committed` tokens survived the stopping criteria."""
        self.num_rounds += 1
        self.num_committed += num_committed
        for counts in (self, self.by_source[source]):
            counts.num_drafted += num_drafted
            counts.num_verified += num_verified
            counts.num_accepted += min(num_accepted, num_committed)
        missing = num_verified - len(self.verified_by_position)
        self.verified_by_position.extend([0] * missing)
        self.accepted_by_position.extend([0] * missing)
        for position in range(min(num_verified, num_accepted + 1)):
            self.verified_by_position[position] += 1
            self.accepted_by_position[position] += position < num_accepted

    def add_tokens(self, row: int, are_drafts: Sequence[bool]) -> None:
        """Remember where a row's new tokens came from."""
        self.origins[row].extend(are_drafts)

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the time of a block to `name`; on an accelerator, after the queue has drained."""
        start = perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        setattr(self, name, getattr(self, name) + perf_counter() - start)
