"""What one call of `generate` measured about its speculation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

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
    """What has become of a round so far; the fields are those of a `Round`, one count a row.

    Where drafts branched, `places` are the indices of the accepted ones among all, and `num_tried` is how many places
    behind the anchor there was a draft for, on the way that the text took; both are None for chains.
    """

    num_drafted: int = 0
    confidence: Tensor | None = None
    num_verified: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)
    num_looked_up: tuple[int, ...] = ()
    num_tried: int | None = None
    places: tuple[int, ...] | None = None

    def drafts_of(self, row: int) -> tuple[str, int]:
        """Return who made the drafts of the batch's row, and how many."""
        looked_up = self.num_looked_up[row] if self.num_looked_up else 0
        return ("lookup", looked_up) if looked_up else ("model", self.num_drafted)


@dataclass
class SourceCounts:
    """Drafts of one source: how many were made, how many the target checked, how many became output.

    The last two tell it by position in the draft, as those of `SpeculationStatistics` do for the drafter.
    """

    num_drafted: int = 0
    num_verified: int = 0
    num_accepted: int = 0
    verified_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)

    def add(
        self,
        num_drafted: int,
        num_verified: int,
        num_accepted: int,
        num_output: int,
        *,
        num_positions: int = 0,
    ) -> None:
        """Count the drafts of one row's round, of which `num_output` became output; `num_positions` by position."""
        self.num_drafted += num_drafted
        self.num_verified += num_verified
        self.num_accepted += num_output
        missing = num_positions - len(self.verified_by_position)
        self.verified_by_position.extend([0] * missing)
        self.accepted_by_position.extend([0] * missing)
        for position in range(min(num_positions, num_accepted + 1)):
            self.verified_by_position[position] += 1
            self.accepted_by_position[position] += position < num_accepted


@dataclass
class SpeculationStatistics(SourceCounts):
    """Count rounds and drafts of one call of `generate`, over all rows; `print` it for a summary.

    A round of a row is one verify pass that the row took part in; the prefill is none.

    Example:

        >>> statistics = SpeculationStatistics(scheduler="fixed", verify_seconds=0.5)
        >>> statistics.add_round(num_drafted=7, num_verified=7, num_accepted=3, num_committed=4)
        >>> print(statistics)
        tau 4.00: tokens per round, over 1 round; 3 of 7 verified drafts accepted (43%); 8.0 tokens/s after the prefill
        scheduler fixed

    Attributes:
        num_target_passes: forward passes of the target, the prefill included; a pass serves all rows.
        num_rounds: verify passes, summed over rows.
        num_drafted: tokens that were proposed.
        num_verified: drafts the target checked, after the scheduler's cut.
        num_accepted: drafts that became output.
        num_committed: tokens of the rounds' output: accepted drafts and the target's own, up to each row's end. The
            prefill's token is not among them.
        by_source: drafts of the drafter under `"model"`, those looked up under `"lookup"`.
        verified_by_position: number of rounds whose prefix was accepted up to position k and that verified draft k, of
            the drafter's drafts alone: one that was looked up has no place in its block.
        accepted_by_position: number of these rounds in which draft k was accepted.
        draft_seconds: time in the drafter.
        verify_seconds: time in the target, the prefill left out.
        prefill_seconds: time in the prefill.
        other_seconds: the rest of the rounds: sampling, bookkeeping, criteria, streaming.
        origins: per row, for every generated token, whether it was a draft.
        token_sources: per row, for every generated token, who gave it: `"target"`, `"model"` or `"lookup"`.
        rounds: every verify pass, in order.
        scheduler: name of the scheduler, or None where it is not known.
        num_parked: passes that the scheduler left without drafts because drafting would not pay.
        parked_because: why drafting is parked at the end, or None if it is not.
    """

    num_target_passes: int = 0
    num_rounds: int = 0
    num_committed: int = 0
    by_source: dict[str, SourceCounts] = field(
        default_factory=lambda: {"model": SourceCounts(), "lookup": SourceCounts()}
    )
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    prefill_seconds: float = 0.0
    other_seconds: float = 0.0
    origins: list[list[bool]] = field(default_factory=list, repr=False)
    token_sources: list[list[str]] = field(default_factory=list, repr=False)
    rounds: list[Round] = field(default_factory=list, repr=False)
    scheduler: str | None = None
    num_parked: int = 0
    parked_because: str | None = None
    _events: list[Any] = field(default_factory=list, repr=False, compare=False)

    @property
    def tau(self) -> float:
        """Accepted length, tokens per round, the bonus token included (the paper's tau); NaN without rounds."""
        return _ratio(self.num_committed, self.num_rounds)

    @property
    def mean_accepted(self) -> float:
        """Accepted drafts per round, without the bonus token (Transformers' `n_matches`); NaN without rounds."""
        return _ratio(self.num_accepted, self.num_rounds)

    @property
    def accept_rate_by_position(self) -> list[float]:
        """Share of drafts accepted at each position, given that the prefix was; NaN where none was reached."""
        return [*map(_ratio, self.accepted_by_position, self.verified_by_position)]

    @property
    def tokens_per_second(self) -> float:
        """Speed of the rounds, over all rows, the prefill left out; NaN where no time was taken."""
        return _ratio(self.num_committed, self.draft_seconds + self.verify_seconds + self.other_seconds)

    def __str__(self) -> str:
        lines = ["; ".join(self._measured())]
        if self.scheduler is not None:
            lines.append(f"scheduler {self.scheduler}")
        if self.num_parked:
            passes = "pass" if self.num_parked == 1 else "passes"
            lines.append(f"drafting was parked for {self.num_parked} {passes}, since it would not have paid")
        if self.parked_because is not None:
            lines.append(f"parked at the end: {self.parked_because}")
        return "\n".join(lines)

    def _measured(self) -> Iterator[str]:
        if not self.num_rounds:
            yield "no rounds: the text ended with its first token"
            return
        yield f"tau {self.tau:.2f}: tokens per round, over {self.num_rounds} round{'s' * (self.num_rounds > 1)}"
        if self.num_verified:
            share = self.num_accepted / self.num_verified
            yield f"{self.num_accepted} of {self.num_verified} verified drafts accepted ({share:.0%})"
        else:
            yield "no draft was verified"
        if not math.isnan(self.tokens_per_second):
            yield f"{self.tokens_per_second:.1f} tokens/s after the prefill"

    def count_parking(self, reason: str | None, num_drafted: int) -> None:
        """Count a pass if it was left without drafts for that reason; None says that drafting goes on."""
        self.num_parked += reason is not None and num_drafted == 0
        self.parked_because = reason

    def start_rows(self, num_rows: int) -> None:
        """Make room for the rows' origins."""
        self.origins = [[] for _ in range(num_rows)]
        self.token_sources = [[] for _ in range(num_rows)]

    def add_round(
        self,
        num_drafted: int,
        num_verified: int,
        num_accepted: int,
        num_committed: int,
        source: str = "model",
        num_tried: int | None = None,
    ) -> None:
        """Count one row's round; `num_committed` tokens survived the stopping criteria.

        Where drafts branched, `num_tried` places had one on the way of the text, else all that were verified.
        """
        self.num_rounds += 1
        self.num_committed += num_committed
        num_output = min(num_accepted, num_committed)
        for counts in (self, self.by_source[source]):
            # positions of both together would tell of neither
            has_positions = counts is not self or source == "model"
            num_positions = (num_verified if num_tried is None else num_tried) if has_positions else 0
            counts.add(num_drafted, num_verified, num_accepted, num_output, num_positions=num_positions)

    def add_tokens(self, row: int, num_tokens: int, num_accepted: int, source: str = "model") -> None:
        """Remember where a row's new tokens came from: accepted drafts of `source`, then the target's own."""
        num_drafts = min(num_accepted, num_tokens)
        self.origins[row].extend([True] * num_drafts + [False] * (num_tokens - num_drafts))
        self.token_sources[row].extend([source] * num_drafts + ["target"] * (num_tokens - num_drafts))

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the time of a block to `name`; on an accelerator, its own time, which `settle` adds later."""
        if device.type == "cuda":
            with torch.cuda.device(device):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                yield
                end.record()
            self._events.append((name, start, end))
            return
        began = perf_counter()
        yield
        setattr(self, name, getattr(self, name) + perf_counter() - began)

    def settle(self) -> None:
        """Add the times that an accelerator has taken; it has finished what was timed, or is waited for."""
        for name, start, end in self._events:
            end.synchronize()
            setattr(self, name, getattr(self, name) + start.elapsed_time(end) / 1000)
        self._events.clear()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
